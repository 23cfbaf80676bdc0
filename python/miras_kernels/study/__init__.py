"""Which attentional bias remembers what: ``python -m miras_kernels study``.

Streams of key-value pairs with one difficulty each (``tasks.py``) are read by memories and by readers that keep every pair
(``contestants.py``); each contestant's step size, decay and thresholds are searched on other streams than those it is reported on
(``recall.py``); small models with each bias are trained on multi-query recall (``mqar.py``). ``verdicts.py`` decides what is a difference,
``document.py`` holds the results, and ``page.py`` and ``plots.py`` say and draw what is in them, and nothing else.

It is part of the package, not of ``examples/``, so that the command works wherever the package is installed, from any folder.
"""
