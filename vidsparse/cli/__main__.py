"""`python -m vidsparse.cli`."""

import sys

from . import main

sys.exit(main())
