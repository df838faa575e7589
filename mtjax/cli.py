"""The `mtjax` command."""

import os
import sys

import tyro

_ABOUT = """Train, balance and merge multi-task models in JAX.

Start with `mtjax quickstart`: a real comparison in about two minutes, no download.
Then `mtjax list` shows methods and data, and `mtjax train` compares any of them:

  mtjax train --data multi_mnist --methods equal pcgrad --seeds 5 --out runs/mine
  mtjax data prepare energy_efficiency --from FOLDER --data-dir DATA
  mtjax train --data energy_efficiency --data-dir DATA --out runs/energy
  mtjax merge --method ties --base A --models B C D --out E
  mtjax export my_module:make --checkpoint E --out model.jax

An interrupted run goes on when the same command is given again.
Errors exit with status 2 and change nothing; MTJAX_DEBUG=1 shows their traceback.
"""


def data() -> None:
    """Prepare data sets: `mtjax data prepare`, `mtjax data list`."""


def main(args: list[str] | None = None) -> None:
    """Runs the command; exits with status 2 on errors that the user can mend."""
    args = sys.argv[1:] if args is None else args
    try:
        if args[:1] == ["merge"]:  # imports little: its memory is measured
            from mtjax.merging.command import merge

            tyro.cli(merge, prog="mtjax merge", args=args[1:])
        elif args[:1] == ["data"]:
            from mtjax.data.command import data_list, data_prepare

            commands = {"prepare": data_prepare, "list": data_list}
            _dispatch(commands, data.__doc__, "mtjax data", args[1:])
        else:
            from mtjax.merging.command import merge
            from mtjax.study.command import list_all, quickstart, train
            from mtjax.training.command import export

            commands = {
                "quickstart": quickstart,
                "train": train,
                "merge": merge,
                "export": export,
                "list": list_all,
                "data": data,
            }
            _dispatch(commands, _ABOUT, "mtjax", args)
    except KeyboardInterrupt:
        print("Stopped; give the same command again to go on.", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        if os.environ.get("MTJAX_DEBUG"):
            raise
        print(f"mtjax: error: {error}", file=sys.stderr)
        sys.exit(2)


def _dispatch(commands, description, prog, args) -> None:
    tyro.extras.subcommand_cli_from_dict(
        commands, description=description, prog=prog, args=args
    )
