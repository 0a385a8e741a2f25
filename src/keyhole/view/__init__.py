"""`keyhole view`: images, predictions and what they rest on, in a browser.

The server (`app`) decodes nothing itself: it asks processes that a broken file may end (`decoders`, `worker`).
"""
