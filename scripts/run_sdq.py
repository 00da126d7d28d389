"""Learn the bitwidth of each layer, fine-tune at those bits, and write a packed model.

    accelerate launch scripts/run_sdq.py --model resnet20_cifar --dataset FOLDER_OR_HUB_ID --target_bits 2.0
    accelerate launch scripts/run_sdq.py scripts/demo.yaml --output_dir runs/mine

Stages: teacher (full precision), search (a strategy for each budget), finetune (knowledge distillation at fixed bits, or with
`--epochs 0` calibration only), evaluate (the test split, read once; table, results.json and plots). `--help` lists the
options.

With --push_to_hub --hub_model_id org/name the SDQ models are published at the end, each budget on a branch.

Exit codes: 0 done; 1 done but not published; 2, with one line, for wrong options or data, a file that cannot be read or
written, a loss that is not finite, or ranks that disagree; 130 stopped by Ctrl-C and 143 by SIGTERM, with a checkpoint. The
exit code of a launcher is its own.
"""

import logging
import sys
import warnings

import datasets
import transformers

from sdq_hf.hub.publish import PublishError, check_access, publish_run
from sdq_hf.search.agreement import RankError
from sdq_hf.training.arguments import Arguments, parse_arguments
from sdq_hf.training.interrupt import Interrupt, Interrupted
from sdq_hf.training.report import report
from sdq_hf.training.stages import Run
from sdq_hf.writing import WriteError


def main(argv: list[str]) -> int:
    """Run with the options `argv`; returns the exit code."""
    try:
        arguments = parse_arguments(argv)
        if arguments.run.push_to_hub:
            # A wrong token is better known before the training than after it.
            check_access(str(arguments.run.hub_model_id))
        return run_stages(arguments)
    except WriteError as error:
        print(
            f"run_sdq.py: error: {error}. What is there is still good: make room, and --resume goes on.",
            file=sys.stderr,
        )
        return 2
    except (ValueError, OSError, PublishError, RankError) as error:
        # Wrong options, data and budgets are ValueErrors of ours, each with a message of one line.
        print(f"run_sdq.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def run_stages(arguments: Arguments) -> int:
    # What they would say while they retry is said in the one line at the end.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    with Interrupt() as interrupt:
        try:
            run = Run(arguments, interrupt)
            work(run, arguments.run.stage)
            run.close()
            return publish(run) if arguments.run.stage in ("all", "evaluate") else 0
        except (Interrupted, KeyboardInterrupt):
            folder = arguments.run.output_dir
            print(
                f"Stopped; a checkpoint is in {folder}. The same command and --resume go on from there.",
                file=sys.stderr,
            )
            return interrupt.exit_code


def work(run: Run, last: str) -> None:
    """The stages up to `last`, one after the other."""
    run.teacher()
    if last == "teacher":
        return
    entries = run.search()
    if last == "search":
        return
    run.finetune(entries)
    if last == "finetune":
        return
    report(run, entries)


def publish(run: Run) -> int:
    """Publish the SDQ models of a finished run, in the main process; gives the exit code."""
    options = run.arguments.run
    if not options.push_to_hub or not run.accelerator.is_main_process:
        return 0
    try:
        found = publish_run(
            run.folder, str(options.hub_model_id), license=options.hub_license, private=options.hub_private_repo
        )
    except PublishError as error:
        print(f"run_sdq.py: {error}", file=sys.stderr)
        print(f"Everything is in {run.folder}; publish it with: sdq-hf push {run.folder} {options.hub_model_id}")
        return 1
    for revision, address in found.items():
        print(f"Published {revision}: {address}")
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    warnings.simplefilter("ignore", FutureWarning)  # other packages' notes to their own developers
    sys.exit(main(sys.argv[1:]))
