"""``python -m course_lib`` is the program ``course``."""

import sys

from course_lib.cli import main

sys.exit(main())
