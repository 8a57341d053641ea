"""What is given away: wheels and the sdist (``make wheel``), and that they run where they are promised to.

``python -m release build`` makes them, ``check`` installs each into fresh environments without a compiler and writes
``log.json`` (``make test-wheel``), ``table`` puts what that says into docs/install.md.
"""
