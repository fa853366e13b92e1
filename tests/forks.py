"""Starts scripts in no time: a process that has loaded torch forks for each of them."""

import json
import subprocess
import sys

SERVER = """
import json, os, runpy, sys
import numpy, torch, torch._dynamo  # what any optimizer loads when it is first used
import mpicomp.reducer
for line in sys.stdin:
    folder, words = json.loads(line)
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    os.chdir(folder)
    for number, name in enumerate((os.devnull, "stdout", "stderr")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    sys.argv, sys.path[0] = words, os.path.dirname(words[0])
    runpy.run_path(words[0], run_name="__main__")
    sys.exit()
"""


class Forks:
    """`run` is subprocess.run for a Python script, outside of mpirun; `close` ends the process."""

    def __init__(self, environment):
        self.server = subprocess.Popen([sys.executable, "-c", SERVER], env=environment, text=True,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self, folder, words):
        """Exit status, stdout and stderr of `words`, a script and its arguments, in `folder`."""
        print(json.dumps([str(folder), [*map(str, words)]]), file=self.server.stdin, flush=True)
        status = int(self.server.stdout.readline())
        return subprocess.CompletedProcess(words, status, (folder / "stdout").read_text(),
                                           (folder / "stderr").read_text())

    def close(self):
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()
