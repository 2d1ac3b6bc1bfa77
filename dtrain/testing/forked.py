"""Imported by the server that ranks are forked from, after all else: no rank looks through that.

Python's search for garbage would; and in a fork, each object that it looks at is copied.
"""

import gc

gc.freeze()
