"""The picture and the table of the comparison, made from its results."""

import statistics
from pathlib import Path
from typing import Any

from benchmarks.comparison_tasks import TASKS
from benchmarks.report import replace_between
from lightning_peft import list_methods

LINES = {"linearprobe": "linear probe", "fullfinetuning": "full fine-tuning"}


def write_report(results: dict[str, Any], folder: Path) -> None:
    """``images/compare_methods.png``, and the table between the two marks of ``comparison.md``, both in ``folder``."""
    picture, page = folder / "images" / "compare_methods.png", folder / "comparison.md"
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw(results, picture)
    replace_between("comparison", markdown(results), page)


def ranked(results: dict[str, Any], task: str) -> list[str]:
    """The methods that ran on a task, the best first."""
    done = {name: statistics.mean(row["scores"]) for name, row in results["tasks"][task].items() if "scores" in row}
    return sorted(done, key=lambda name: done[name], reverse=TASKS[task].higher_is_better)


def draw(results: dict[str, Any], file: Path) -> None:
    """One row for each method, those first that are better in both; a bar spans the seeds, a dot is their mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    places = {task: {name: i for i, name in enumerate(ranked(results, task))} for task in TASKS}
    last = max(map(len, places.values()))
    names = sorted(
        {name for place in places.values() for name in place} - LINES.keys(),
        key=lambda name: sum(place.get(name, last) for place in places.values()),
        reverse=True,
    )
    rows = {row.name: row for row in list_methods()}
    colours = {family: f"C{i}" for i, family in enumerate(sorted({rows[name].family for name in names}))}
    figure, panels = plt.subplots(1, 2, figsize=(10, 1.8 + 0.21 * len(names)), sharey=True, layout="constrained")
    for axes, (task, kind) in zip(panels, TASKS.items(), strict=True):
        done = results["tasks"][task]
        for y, name in enumerate(names):
            if "scores" in done.get(name, {}):
                scores, colour = done[name]["scores"], colours[rows[name].family]
                filled = colour if done[name]["size"] else "white"
                axes.plot([min(scores), max(scores)], [y, y], color=colour, linewidth=2, alpha=0.5)
                axes.plot(statistics.mean(scores), y, "o", color=colour, markerfacecolor=filled, markersize=5)
        for (name, label), style in zip(LINES.items(), (":", "--"), strict=True):
            if "scores" in done.get(name, {}):
                axes.axvline(
                    statistics.mean(done[name]["scores"]), color="black", linestyle=style, linewidth=1, label=label
                )
        axes.set_title(f"{task}: {'more' if kind.higher_is_better else 'less'} is better", fontsize=10)
        axes.set_xlabel(kind.score_name)
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(names)), [rows[name].cls.__name__ for name in names], fontsize=8)
    panels[0].set_ylim(-0.7, len(names) - 0.3)
    for family, colour in colours.items():
        panels[1].plot([], [], "o", color=colour, label=family)
    panels[1].plot([], [], "o", color="gray", markerfacecolor="white", label="not sized to the budget")
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(file, dpi=130)


def markdown(results: dict[str, Any]) -> str:
    """The picture, one table for each task, and how they were made."""
    settings = results["settings"]
    steps = settings["epochs"] * settings["steps"]
    parts = [
        "![Scores of all methods on both tasks](images/compare_methods.png)",
        f"{results['hardware']}; {steps} steps, {len(settings['seeds'])} seeds, learning rates "
        f"{', '.join(f'{rate:g}' for rate in settings['rates'])}.",
    ]
    for task, kind in TASKS.items():
        budget, done = results["budget"][task], results["tasks"][task]
        before = f" Before training: {results['before'][task]:.3f}." if task in results["before"] else ""
        parts.append(f"### {task.capitalize()}\n\nBudget: {budget:,} parameters.{before}")
        head = ["Method", "Size", "Trained", "Of the budget", "Rate", kind.score_name.capitalize(), "Training loss"]
        lines = [head, ["---", "---", *["---:"] * 5]]
        for name in ranked(results, task):
            row = done[name]
            size = ", ".join(f"`{key}={value}`" for key, value in row["size"].items()) or "as it is"
            share = f"{100 * row['trainable'] / budget:.0f} %"
            edge = "" if settings["rates"][0] < row["rate"] < settings["rates"][-1] else "*"
            rate = f"{row['rate']:g}{edge}" if row["trainable"] else ""  # a new head alone has a rate of its own
            counted = [f"{row['trainable']:,}", share, rate]
            lines.append([_link(name), size, *counted, _spread(row["scores"], kind), _mean(row["losses"])])
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
        failed = [f"{_link(name)} ({row['error']})" for name, row in sorted(done.items()) if "error" in row]
        if failed:
            parts.append(f"Not run: {'; '.join(failed)}.")
    parts.append("\\* the lowest or the highest rate that was tried: one outside of the grid may be better.")
    return "\n\n".join(parts)


def _link(name: str) -> str:
    cls = next(row.cls for row in list_methods() if row.name == name)
    return f"[{cls.__name__}](methods/{name}.md)"


def _mean(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f}"


def _spread(scores: list[float], kind: Any) -> str:
    digits = 1 if kind.higher_is_better else 3
    low, high = min(scores), max(scores)
    return f"{statistics.mean(scores):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
