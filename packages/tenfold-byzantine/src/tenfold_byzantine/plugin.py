"""The plugin `byzantine`: descriptions only, importable without any heavy library."""

from __future__ import annotations

from tenfold import CommandSpec, ComponentSpec, Param, PluginInfo, hookimpl

_EXTRAS = ("tenfold-byzantine",)
_HEAVY = ("numpy",)
_PRESETS = ("paper-q1", "paper-q2", "prompts-q3", "smoke")
_TAXONOMIES = ("full", "paper-text", "paper-figures")
_KEEP = Param(
    "keep_prompts", "str", "hash", "what event logs keep of prompts",
    choices=("full", "hash", "none"), identity=False,
)  # fmt: skip


@hookimpl
def tenfold_plugin() -> PluginInfo:
    """Who we are."""
    return PluginInfo(
        name="byzantine",
        summary="Consensus games of language-model agents with faulty players",
        paper="arXiv:2603.01213",
    )


@hookimpl
def tenfold_datasets() -> list[ComponentSpec]:
    """Games to be played."""
    return [
        ComponentSpec(
            "games",
            "tenfold_byzantine.games:Games",
            "Games of a file, a preset or given settings, times a grid, times replicates",
            params=(
                Param("file", "path", None, "game file or sweep file"),
                Param("preset", "str", None, "an experiment instead of a file", choices=_PRESETS),
                Param("game", "table", None, "settings of the game, over those of the file"),
                Param("honest", "table", None, "settings of the honest side, the same way"),
                Param("byzantine", "table", None, "settings of the Byzantine side, the same way"),
                Param("grid", "table", None, '"game.n_byzantine" = [0, 1, 2] and the like'),
                Param("replicates", "int", None, "games per cell; left out: the file's, else 1",
                      minimum=1),
                Param("seed", "int", None, "of the games; left out: the run's"),
                Param("paired", "bool", None, "one seed per replicate in all cells; left out: yes"),
                Param("limit", "int", None, "at most this many games", minimum=1),
                Param("shuffle_seed", "int", None, "order by this seed"),
            ),
            provides=("game",),
            tags=("games", "consensus"),
        ),
    ]  # fmt: skip


@hookimpl
def tenfold_evaluators() -> list[ComponentSpec]:
    """What plays them."""
    generates = ("generate",)
    return [
        ComponentSpec(
            "consensus",
            "tenfold_byzantine.consensus:Consensus",
            "Plays games of scripted and language-model agents; how they ended, per cell",
            params=(
                Param("honest", "str", None, "policy of all honest agents, e.g. low-median, "
                      "instead of the games' own; llm takes the model of the role"),
                Param("byzantine", "str", None, "the same for Byzantine agents, e.g. "
                      "collude:v=25"),
                Param("width", "int", 64, "games played side by side", minimum=1, identity=False),
                Param("taxonomy", "str", "full", "how outcomes are grouped", choices=_TAXONOMIES,
                      identity=False),
                Param("base", "str", "", "label of the cell that others are compared with; "
                      "left out: the first", identity=False),
                Param("reference", "str", None, "published rates to show beside ours",
                      choices=_PRESETS, identity=False),
                Param("events", "bool", True, "keep an event log per game", identity=False),
                _KEEP,
                Param("stories", "int", 6, "games that the report shows in full", minimum=0,
                      identity=False),
                Param("unsafe", "bool", False, "run algorithms outside of their bounds"),
            ),
            requires={"honest?": generates, "byzantine?": generates, "*?": generates},
            data={"games": ("game",)},
            modules=_HEAVY,
            extras=_EXTRAS,
            tags=("games", "consensus"),
        ),
    ]  # fmt: skip


_PLAYING = (
    Param("out", "path", None, "folder for games, table and report"),
    Param("resume", "bool", False, "go on with what the folder holds"),
    Param("shard", "str", "0/1", "play part I of K, written I/K from 0"),
    Param("until_width", "float", None, "end a cell once its valid rate is known to within this, "
          "either way (half-width of Wilson's interval)", minimum=0.001, maximum=0.49),
    Param("replicates", "int", None, "games per cell; the least number with --until-width",
          minimum=1),
    Param("model", "str", None, "checkpoint folder, or a run file or recipe with models by role"),
    Param("width", "int", 64, "games played side by side", minimum=1),
    Param("events", "bool", True, "keep an event log per game"),
)  # fmt: skip
_SIDES = (
    Param("honest", "str", None, "policy of the honest agents, e.g. low-median"),
    Param("byzantine", "str", None, "policy of the Byzantine agents, e.g. collude:v=25"),
)
_UNSAFE = Param("unsafe", "bool", False, "run algorithms outside of their bounds")
_GAME = Param("game", "path", positional=True, help="event log, or FOLDER/ID")
_REFERENCE = Param("reference", "str", None, "published rates to show", choices=_PRESETS)
_TAXONOMY = Param("taxonomy", "str", "full", "how outcomes are grouped", choices=_TAXONOMIES)


def _playing() -> list[CommandSpec]:
    return [
        CommandSpec(
            "run",
            "tenfold_byzantine.commands:run",
            "play one game and watch it",
            (
                Param("file", "path", None, "game file", positional=True),
                *_SIDES,
                Param("n_honest", "int", None, "honest agents", minimum=1),
                Param("n_byzantine", "int", None, "Byzantine agents", minimum=0),
                Param("max_rounds", "int", None, "deadline", minimum=1),
                Param("value_range", "list[int]", (), "smallest and largest value, e.g. 0,50"),
                Param("quota", "str", None, "stop votes that end the game: 2/3, 0.66 or a count"),
                Param("awareness", "str", None, "what prompts say about Byzantine agents"),
                Param("topology", "str", None, "network, e.g. ring:k=2"),
                Param("seed", "int", None, "the same seed gives the same game"),
                Param("model", "str", None, "checkpoint folder, or a run file with models"),
                Param("out", "path", None, "folder for the event log"),
                Param("keep_prompts", "str", "full", "what the log keeps of prompts",
                      choices=("full", "hash", "none")),
                _UNSAFE,
            ),
        ),
        CommandSpec(
            "sweep",
            "tenfold_byzantine.commands:sweep",
            "play a grid of games; resumable, in shards, as long as intervals are wide",
            (Param("file", "path", positional=True, help="sweep file"), *_PLAYING, _UNSAFE),
        ),
        CommandSpec(
            "reproduce",
            "tenfold_byzantine.commands:reproduce",
            "play one of the paper's experiments, beside its published rates",
            (
                Param("name", "str", positional=True, help="experiment", choices=_PRESETS),
                *_SIDES,
                *_PLAYING,
            ),
        ),
        CommandSpec(
            "simulate",
            "tenfold_byzantine.listing:simulate",
            "play one-round rules by the million",
            (
                Param("honest", "str", positional=True, help="rule of the honest agents"),
                Param("byzantine", "str", "silent", "adversary"),
                Param("n_honest", "int", 8, "honest agents", minimum=1),
                Param("n_byzantine", "int", 0, "Byzantine agents", minimum=0),
                Param("games", "int", 1_000_000, "how many", minimum=1),
                Param("seed", "int", 0, "of all draws"),
                Param("stop", "str", "rule", "when agents stop: by what they hear, or, as an "
                      "observer would, at unanimity", choices=("rule", "unanimity")),
            ),
        ),
    ]  # fmt: skip


def _reading() -> list[CommandSpec]:
    where = Param("source", "str", positional=True,
                  help="sweep folder, run, or folder of event logs")  # fmt: skip
    return [
        CommandSpec("replay", "tenfold_byzantine.reading:replay",
                    "play a recorded game again and compare every state", (_GAME,)),
        CommandSpec(
            "show",
            "tenfold_byzantine.reading:show",
            "show a game, or what an agent was asked and answered",
            (
                _GAME,
                Param("agent", "str", None, "agent_3"),
                Param("round", "int", None, "a round", minimum=1),
            ),
        ),
        CommandSpec(
            "classify",
            "tenfold_byzantine.reading:classify",
            "count how games ended",
            (Param("folder", "str", positional=True,
                   help="sweep folder, run, or folder of event logs"), _TAXONOMY),
        ),
        CommandSpec(
            "report",
            "tenfold_byzantine.reading:report",
            "write an HTML report of games, or of one game",
            (
                Param("sources", "list[str]", positional=True,
                      help="sweep folders, runs, folders of event logs; or one event log"),
                Param("out", "path", "report.html", "HTML file"),
                _REFERENCE,
                _TAXONOMY,
                Param("stories", "int", 6, "games shown in full", minimum=0),
            ),
        ),
        CommandSpec(
            "plot",
            "tenfold_byzantine.reading:plot",
            "write one chart as SVG",
            (
                Param("kind", "str", positional=True,
                      help="of a game: trajectory, votes, blocs, influence; of many: rates, "
                      "outcomes, heatmap, survival"),
                where,
                Param("out", "path", None, "SVG file; left out: KIND.svg"),
            ),
        ),
        CommandSpec(
            "export",
            "tenfold_byzantine.reading:export",
            "write the result table, one row per game",
            (where, Param("out", "path", help="file ending in .csv, .parquet or .jsonl")),
        ),
    ]  # fmt: skip


def _listing() -> list[CommandSpec]:
    return [
        CommandSpec("agents", "tenfold_byzantine.listing:agents",
                    "list scripted honest policies and what is proven about them"),
        CommandSpec("adversaries", "tenfold_byzantine.listing:adversaries",
                    "list adversaries and the powers they need"),
        CommandSpec("topologies", "tenfold_byzantine.listing:topologies", "list networks"),
        CommandSpec(
            "bounds",
            "tenfold_byzantine.listing:bounds",
            "what theory says about n agents, f of them faulty",
            (
                Param("n", "int", help="all agents", minimum=1),
                Param("f", "int", help="Byzantine ones", minimum=0),
                Param("values", "int", 51, "possible initial values", minimum=1),
                Param("quota", "str", "2/3", "stop votes that end the game"),
            ),
        ),
        CommandSpec(
            "power",
            "tenfold_byzantine.listing:power",
            "how many games per cell tell two rates apart",
            (
                Param("p0", "float", help="one rate", minimum=0.0, maximum=1.0),
                Param("p1", "float", help="the other", minimum=0.0, maximum=1.0),
                Param("power", "float", 0.8, "wanted power", minimum=0.0, maximum=1.0),
                Param("alpha", "float", 0.05, "level of the two-sided test", minimum=0.0,
                      maximum=1.0),
            ),
        ),
    ]  # fmt: skip


@hookimpl
def tenfold_commands() -> list[CommandSpec]:
    """`tenfold byzantine ...`."""
    return [*_playing(), *_reading(), *_listing()]
