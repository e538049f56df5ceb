"""`python -m fl_attack.plots FOLDER [KIND]`."""

import sys

from fl_attack.plots import main

sys.exit(main(sys.argv[1:]))
