"""python -m fastdiff.testing --write DIR    writes the golden files anew, by the reference alone: `make golden`
python -m fastdiff.testing --run TASK ANSWER   golden cases in a process of their own: `fastdiff selftest` calls it"""

import sys
from pathlib import Path


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--write"] and len(arguments) == 2:
        from .digests import write

        print("\n".join(write(Path(arguments[1]))))
        return 0
    if arguments[:1] == ["--run"] and len(arguments) == 3:
        from .backends import answer_task

        answer_task(*map(Path, arguments[1:]))
        return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
