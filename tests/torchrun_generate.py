"""``ppsd`` as each rank of torchrun runs it, with the CUDA engine in Triton's interpreter.

Arguments are those of ``ppsd``.
"""

import sys

import triton_cpu

triton_cpu.claim()

from ppsd_cli.cli import main  # noqa: E402
from ppsd_cli.commands import session  # noqa: E402
from ppsd_cli.runtime import engine  # noqa: E402

if __name__ == "__main__":
    assert triton_cpu.missing() is None
    for module in (engine, session):
        module.has_graphs = lambda _config: True
    main(sys.argv[1:])
