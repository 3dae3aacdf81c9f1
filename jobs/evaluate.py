"""Measures a finished model on held-out rows and writes the result on its registered version.

python -m jobs.evaluate [RECIPE] [--home DIR] [--dry-run] [--any.field value ...]
"""

from __future__ import annotations

from jobs.command_line import from_command_line, report_errors
from jobs.recipes import EVALUATE
from jobs.session import is_main_process, prepare
from jobs.wiring.evaluate import evaluate_worker, report_there, verdict
from jobs.wiring.publishing import publish_evaluation
from jobs.wiring.recording import first_validation
from jobs.wiring.training import launch
from ldm.model_card import load_card, model_digest


@report_errors()
def main() -> None:
    """Evaluate the model, unless this very evaluation is there, and say whether it passes its gate."""
    prepare()
    config, dry_run = (asked := from_command_line("evaluate", EVALUATE)).config, asked.dry_run
    card = load_card(config.model_folder)
    there = report_there(config)
    if dry_run:
        print(f"model     {config.model_folder} ({model_digest(card)[:12]})")
        print(
            f"protocol  {config.protocol.digest()[:12]}: {config.protocol.num_images} images, {config.protocol.sampler}"
        )
        print("evaluated already" if there else "not evaluated yet")
        return
    report = there or launch(evaluate_worker, config, config.launch, "evaluate", works_alone=True)
    if not is_main_process():
        return
    first = first_validation(config.root)["validation_loss"]
    bounds = verdict(config, card.prediction, report["metrics"], first)
    for name, (sentence, holds) in bounds.items():
        print(f"{'pass' if holds else 'FAIL'}  {name}: {sentence}")
    for name, value in report["metrics"].items():
        print(f"      {name} {value:.4f}")
    has_passed = all(holds for _, holds in bounds.values())
    publish_evaluation(config, report, has_passed)


if __name__ == "__main__":
    main()
