"""Run command lines, given as JSON, under limits of memory and time; print code, output and errors of each as JSON."""

import contextlib
import io
import json
import resource
import sys

resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))

from keyhole.cli.main import main  # noqa: E402

ends = []
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(words)
    ends.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(ends))
