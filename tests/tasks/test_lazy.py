"""Looking a task up must not cost an import of torch."""

import subprocess
import sys


def test_tasks_do_not_import_torch():
    code = (
        "import sys; from edgekd.tasks import get_task; get_task('policy'); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
