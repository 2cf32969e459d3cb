"""A run's model card in Markdown, with the head of Hugging Face's cards: a folder with it can be uploaded there."""

from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ddpm.evaluation import compared_run, results_table
from ddpm.runs import names
from ddpm.runs.evaluations import Report
from ddpm.utils.progress import printable


def card(uri: str, use: str = "", reports: Sequence[Report] | None = None) -> str:
    """The card of the run at `uri`, with code that uses it, and its evaluations (None: those in the run's folder)."""
    if uri.startswith(names.BUILTIN):
        return (names.builtin_folder(uri) / "README.md").read_text()
    (run,) = compared_run.read([uri])
    if reports is None:
        newest = (run.key, run.images_seen)
        reports = [
            report
            for report in run.evaluations
            if newest in [(result.run_key, result.images_seen) for result in report.results]
        ]
    environment = Environment(
        loader=PackageLoader("ddpm.export"),
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else printable(str(value)),
    )
    return environment.get_template("card.md").render(
        run=run,
        use=use or f"ddpm sample {uri}",
        reports=[
            (Markup(results_table.table(report).markdown()), results_table.remarks(report, uri))
            for report in reports
        ],
    )
