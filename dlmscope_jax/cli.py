"""The command line: ``dlmscope VERB [CONFIG.yaml] [--section.field=value ...]``.

A thin face over the functions of ``recipes``. Nothing heavy is imported before a verb runs, so ``--help`` is instant.
"""

import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from dlmscope_jax import __version__, config
from dlmscope_jax.errors import PeerLost, Preempted, UserError
from dlmscope_jax.recipes.configs import Cluster, Run
from dlmscope_jax.training.heap import keep_freed_memory

# verb -> module of recipes, function, what it does
VERBS = {
    "quickstart": ("quickstart", "quickstart", "the whole way, from text to report; on the pocket models unless a config names others"),
    "harvest": ("pipeline", "harvest", "run the models over the text and keep activations"),
    "train": ("pipeline", "train", "train dictionaries on what was harvested"),
    "evaluate": ("pipeline", "evaluate", "examine dictionaries on the test side: fidelity, and what inserting them costs"),
    "report": ("pipeline", "report", "write the run's results into one HTML file"),
    "plan": ("plan", "plan", "say what a run takes, on devices that may not be here: memory, traffic, time; --topology=v5e:16x16"),
    "profile": ("profile", "profile", "run a few training steps under the profiler, and say where their time goes"),
    "cache": ("cache", "", "info | verify | repair, of a config's stores or of one at a URL: what is in it, what is damaged, mend it"),
    "doctor": ("doctor", "doctor", "say what this machine has: versions, devices, disk, corpus"),
}
PREEMPTED = 75  # sysexits' EX_TEMPFAIL: a scheduler may start the same command again
_PROCESSES = "dlmscope_jax.distributed.processes"
# verbs that several processes do together; the others belong on one machine
_TOGETHER = ("harvest", "train", "profile")
_ALONE = ("quickstart", "evaluate", "report")
_ACTIONS = ("info", "verify", "repair")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code: 0; 2 for a mistake of the user's, which is one line on stderr; 75 to be run again."""
    if argv is None:  # a process of our own
        keep_freed_memory()
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        code, message = _outcome([a for a in arguments if a != "--debug"], debug)
    except Exception as error:  # a defect, or --debug
        _tell_the_others(1, f"{type(error).__name__}: {error}")
        raise
    if message:
        print(f"dlmscope: {message}", file=sys.stderr)
    if code != PREEMPTED:  # for which all processes stop by themselves
        _tell_the_others(code, message)
    return code


def _outcome(arguments: list[str], debug: bool) -> tuple[int, str]:
    """Runs one verb: the exit code, and a line for stderr."""
    try:
        return _run(arguments), ""
    except UserError as error:
        return _refused(" ".join(str(error).split()), debug)
    except Preempted as error:
        return PREEMPTED, str(error)
    except PeerLost as error:
        return 1, str(error)
    except KeyboardInterrupt:
        return 130, "stopped; the same command goes on from here"
    except BrokenPipeError:  # the reader, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1, ""
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _refused(
                f"the disk is full ({error.filename or 'while writing'}): free some space and give the same command again", debug
            )
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            return _refused(f"{error.filename}: {error.strerror}: you may not read or write it (--root= names another run folder)", debug)
        if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG):
            return _refused(f"{error.filename}: {error.strerror}: name a folder there, or another one with --root=", debug)
        raise


def _refused(message: str, debug: bool) -> tuple[int, str]:
    if debug:
        raise  # noqa: PLE0704  # only called while an exception is handled
    return 2, message


def _tell_the_others(code: int, reason: str) -> None:
    """Ends this process of several after a failure, so that the others stop too; returns where it is alone."""
    if not code or _PROCESSES not in sys.modules:  # what was never imported has joined nobody
        return
    if sys.exc_info()[0] is not None and sys.modules["jax"].process_count() > 1:
        traceback.print_exc()  # which nobody else would
    sys.modules[_PROCESSES].end(code, reason)


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        print(f"dlmscope_jax {__version__}")
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        raise UserError(f"no verb {verb!r}; there are {', '.join(VERBS)}")
    wants_help = any(a in ("-h", "--help") for a in rest)
    files, overrides = _split([a for a in rest if a not in ("-h", "--help")])
    module, function, what = VERBS[verb]
    if verb == "cache":
        if not wants_help or files:
            function = _action(files)
        store = bool(files) and not files[0].endswith((".yaml", ".yml"))
        if store and not wants_help:
            if overrides:
                raise UserError(f"cache {function}: {overrides[0]} belongs to a config; a store at a URL has no options")
            getattr(importlib.import_module(f"dlmscope_jax.recipes.{module}"), function)(files[0])
            return 0
    if len(files) > 1:
        raise UserError(f"{verb} takes one config, got {' and '.join(files)}; write options as --section.field=value")
    run = config.load(Run, files[0] if files else None, overrides)
    if wants_help:
        import tyro

        print(f"dlmscope {verb}: {what}.\nOptions override the config's fields: --section.field=value; lists as [a, b].\n")
        tyro.cli(tyro.conf.AvoidSubcommands[Run], prog=f"dlmscope {verb} [CONFIG.yaml]", default=run, args=["--help"], use_underscores=True)
    if verb in (*_TOGETHER, *_ALONE):
        _join_the_others(verb, run.cluster)
    getattr(importlib.import_module(f"dlmscope_jax.recipes.{module}"), function)(run)
    return 0


def _join_the_others(verb: str, cluster: Cluster) -> None:
    """Before anything touches a device: the processes of a job find each other; the identity for a process alone.

    Raises:
      UserError: a verb that one process does.
    """
    import jax

    from dlmscope_jax import distributed

    distributed.start(cluster.coordinator, cluster.processes, cluster.process)
    if verb in _ALONE and jax.process_count() > 1:
        raise UserError(
            f"{verb} is done by one process, here are {jax.process_count()}: give {', '.join(_TOGETHER)} to all of them, it to one"
        )


def _action(files: list[str]) -> str:
    """Takes the first word off ``cache ACTION ...``."""
    if not files or files[0] not in _ACTIONS:
        given = f"{files[0]!r} is none of" if files else "say which of"
        raise UserError(f"cache: {given} {', '.join(_ACTIONS)}: dlmscope cache verify CONFIG.yaml, or the URL of a store")
    return files.pop(0)


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Files and overrides; ``--a.b value`` is ``--a.b=value``."""
    files, overrides = [], []
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("-"):
            files.append(argument)
        else:
            value = "" if "=" in argument else next(rest, "")
            if value.startswith("--"):
                raise UserError(f"{argument} has no value: write {argument}=VALUE")
            overrides.append(argument if "=" in argument else f"{argument}={value}")
    return files, overrides


def _overview() -> str:
    lines = [f"  {verb:<11} {what}" for verb, (_, _, what) in VERBS.items()]
    return "\n".join(
        [
            "usage: dlmscope VERB [CONFIG.yaml] [--section.field=value ...] [--debug]",
            "",
            "Train and examine dictionaries on diffusion language models and their autoregressive twins.",
            "",
            *lines,
            "",
            "dlmscope VERB --help lists the fields. --debug shows the traceback of a mistake.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
