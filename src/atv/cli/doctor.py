"""`atv doctor`."""

from accelerate.utils import set_seed  # transformers' own imports peft, which takes seconds

from atv.cli.loading import frozen_llm
from atv.cli.options import Doctor
from atv.cli.output import output, print_lines
from atv.config import ATVConfig
from atv.data import load_tasks, unread_queries
from atv.doctor import check_wiring, model_summary
from atv.errors import ATVError
from atv.model import ATVModel


def examine(given: Doctor) -> bool:
    """Print every check; true if all passed."""
    if given.data is None and (given.input is not None or given.output is not None):
        raise ATVError("--input and --output name columns of a table; expected --data with that table.")
    config = ATVConfig(
        generator=given.generator,
        pooling=given.pooling,  # type: ignore[arg-type]
        layers=given.layers,
        layer_path=given.layer_path,
        positions=given.positions,
    )
    tasks = [] if given.data is None else load_tasks(data=given.data, input=given.input, output=given.output)
    llm, tokenizer = frozen_llm(given.llm, given.loading).load()
    set_seed(0)
    atv = ATVModel(llm, config, tokenizer=tokenizer)
    print_lines([model_summary(atv)])
    if atv.generator.tokenizer is not None:
        for task in tasks:
            print_lines(unread_queries(task, atv.generator.tokenizer))
    checks = check_wiring(atv)
    for check in checks:
        mark = "[green]ok    [/green]" if check.passed else "[red]FAILED[/red]"
        output.print(f"{mark} {check.name}  [dim]({check.found})[/dim]", highlight=False, soft_wrap=True)
    failed = [check.name for check in checks if not check.passed]
    print_lines([f"{len(failed)} of {len(checks)} checks failed." if failed else f"All {len(checks)} checks passed."])
    return not failed
