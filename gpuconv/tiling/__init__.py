"""What ``conv2d_tiled`` is made of: images larger than memory, tile by tile.

``job`` is one call. ``tiles`` cuts the result, ``windows`` reads what a tile's windows need through the border of the
whole image, ``storage`` knows the kinds of arrays that lie on a disk, ``record`` remembers what is finished, and
``pipeline`` reads, computes and writes at the same time.
"""
