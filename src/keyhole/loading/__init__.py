"""Reads patches ahead in threads and packs them into chunks; unreadable patches are left out, counted and listed.

In the order of calls: `reader` opens batches and plans their chunks, `batch` yields these, `reading` is one task of a
thread, `stream` holds what a pass shares, `buffers` is its memory, and `chunks` are its input and output.
"""

from keyhole.loading.batch import Batch as Batch
from keyhole.loading.chunks import Chunk as Chunk
from keyhole.loading.chunks import Delivery as Delivery
from keyhole.loading.chunks import FetchOnly as FetchOnly
from keyhole.loading.chunks import Opener as Opener
from keyhole.loading.chunks import Shuffled as Shuffled
from keyhole.loading.reader import Reader as Reader
from keyhole.loading.stream import OnError as OnError
