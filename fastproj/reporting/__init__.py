"""Reports: from run folders and studies to one self-contained HTML page.

``read`` and ``curves`` take what a run has written, ``figures`` and ``samples`` draw it, ``page``
holds it as HTML; ``run``, ``comparison`` and ``study`` are the three kinds of page.
"""
