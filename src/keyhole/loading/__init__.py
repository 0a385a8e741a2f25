"""Patches, read ahead in threads and packed into chunks; what cannot be read is left out, counted and listed.

In the order of calls: `reader` plans batches, `batch` gives their chunks, `reading` is a task of a thread, `stream` is
what all share, `buffers` their memory, `chunks` what goes in and comes out.
"""

from keyhole.loading.batch import Batch as Batch
from keyhole.loading.chunks import Chunk as Chunk
from keyhole.loading.chunks import Delivery as Delivery
from keyhole.loading.chunks import FetchOnly as FetchOnly
from keyhole.loading.chunks import Opener as Opener
from keyhole.loading.reader import Reader as Reader
from keyhole.loading.stream import OnError as OnError
