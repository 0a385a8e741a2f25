"""Patches read ahead, in parallel and in order; what cannot be read is masked, counted and listed."""

from keyhole.reading.batch import Batch as Batch
from keyhole.reading.chunks import Chunk as Chunk
from keyhole.reading.chunks import Delivery as Delivery
from keyhole.reading.chunks import FetchOnly as FetchOnly
from keyhole.reading.chunks import Opener as Opener
from keyhole.reading.reader import Reader as Reader
from keyhole.reading.stream import OnError as OnError
