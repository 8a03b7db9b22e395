"""One page of everything that specdec measured below a folder.

``discover`` finds the files, ``readers`` makes a section of each (with ``measured`` and ``figures``), ``render`` writes
the page, ``browser`` looks at it in a real browser.
"""
