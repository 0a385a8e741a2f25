"""Patches read ahead, in parallel and in order; what cannot be read is masked, counted and listed."""

from keyhole.loading.batch import Batch as Batch
from keyhole.loading.chunks import Chunk as Chunk
from keyhole.loading.chunks import Delivery as Delivery
from keyhole.loading.chunks import FetchOnly as FetchOnly
from keyhole.loading.chunks import Opener as Opener
from keyhole.loading.reader import Reader as Reader
from keyhole.loading.stream import OnError as OnError
