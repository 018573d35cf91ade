"""The tables of all built-in plugins in docs/plugins.md, one for each topic, are generated from the classes."""
from pathlib import Path

from loopctl import available, load
from loopctl.composition.compose import SPECS
from loopctl.composition.options import plugin_options
from loopctl.optim.schedule import Schedule

PAGE = Path(__file__).parents[1] / "docs" / "plugins.md"
BEGIN, END = "<!-- begin of the tables, which `python tests/test_plugins_page.py` writes -->\n", "<!-- end of the tables -->\n"
OF_ALL_SCHEDULES = {*plugin_options(Schedule)} - {"by"}          # explained above the tables


def hooks_of(cls):
    """The hooks of a class in words: which it replaces, wraps and uses."""
    marked = {hook: getattr(cls, hook).loopctl_impl for hook in SPECS if hasattr(getattr(cls, hook, None), "loopctl_impl")}
    ways = {"replaces": [], "wraps": [], "uses": []}
    for hook, impl in marked.items():
        way = "wraps" if impl["wrapper"] else "replaces" if SPECS[hook].loopctl_spec["firstresult"] else "uses"
        ways[way].append(f"`{hook}`")
    return "; ".join(f"{way} {', '.join(found)}" for way, found in ways.items() if found)


def tables():
    """A heading and a table for each topic, in the order of `loopctl plugins`."""
    topics = {}
    for name, entry in available().items():
        if entry.value.startswith("loopctl.plugins."):
            cls = load(name)
            hidden = OF_ALL_SCHEDULES if issubclass(cls, Schedule) else set()
            options = ", ".join(f"`{option}`" for option in plugin_options(cls) if option not in hidden)
            about = cls.__doc__.split("\n")[0].replace("|", "\\|")
            topics.setdefault(cls.topic, []).append(f"| `{name}` | {about} | {options} | {hooks_of(cls)} |")
    lines = []
    for topic in sorted(topics):
        lines += [f"## Plugins for {topic}", "", "| plugin | what it does | options | hooks |", "|---|---|---|---|", *topics[topic], ""]
    return "\n".join(lines)


def page():
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, "docs/plugins.md has lost the lines around its tables"
    return f"{before}{BEGIN}\n{tables()}\n{END}{after}"


def test_the_tables_in_the_docs_are_up_to_date():
    assert PAGE.read_text() == page(), "run python tests/test_plugins_page.py"


if __name__ == "__main__":
    PAGE.write_text(page())
