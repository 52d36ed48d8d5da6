"""The plugin `toy` of the host's tests."""

from tenfold.hookspecs import hookimpl
from tenfold.spec import ComponentSpec, Param, PluginInfo


@hookimpl
def tenfold_plugin():
    return PluginInfo("toy", "components for tests")


@hookimpl
def tenfold_models():
    return [
        ComponentSpec(
            "upper",
            "toy_components:Upper",
            "capitals",
            params=(
                Param("checkpoint", "path", None),
                Param("prefix", "str", ""),
                Param("device", "str", None, identity=False),
                Param("seed", "int", None),
            ),
            provides=("generate",),
        ),
        ComponentSpec(
            "twice",
            "toy_components:Twice",
            "repeats its base",
            params=(Param("base", "component:model"),),
            provides=("generate",),
            requires={"base": ("generate",)},
            inherits="base",
        ),
        ComponentSpec("broken", "toy_components:broken", "fails", provides=("generate",)),
        ComponentSpec("lies", "toy_components:Lies", "lies", provides=("generate",)),
        ComponentSpec(
            "missing",
            "toy_components:needs_module",
            "needs a module",
            provides=("generate",),
            extras=("toy[more]",),
        ),
        ComponentSpec(
            "learner",
            "toy_components:Upper",
            "trained by default",
            params=(Param("checkpoint", "path"),),
            provides=("generate",),
            trainer="toy:learn",
        ),
    ]


@hookimpl
def tenfold_datasets():
    return [
        ComponentSpec(
            "numbers",
            "toy_components:Numbers",
            "numbers",
            params=(
                Param("size", "int", 5, minimum=0),
                Param("limit", "int", None, minimum=1),
                Param("salt", "str", ""),
            ),
            provides=("text",),
        ),
        ComponentSpec("pictures", "toy_components:Numbers", "wrong kind", provides=("audio",)),
    ]


@hookimpl
def tenfold_evaluators():
    params = (
        Param("batch", "int", 1, minimum=1, identity=False),
        Param("fail", "list[str]", ()),
        Param("die_after", "int", 0, identity=False),
        Param("slow", "float", 0.0, identity=False),
        Param("factor", "float", 1.0, minimum=0, maximum=10),
        Param("trace", "str", "", identity=False),
    )
    data = {"dataset": ("text", "prompt")}
    needs = {"model": ("generate",)}
    return [
        ComponentSpec(
            "lengths",
            "toy_components:Lengths",
            "lengths",
            params,
            (),
            needs,
            data,
            cost="toy_components:cost",
        ),
        ComponentSpec(
            "gradients",
            "toy_components:Lengths",
            "needs gradients",
            params,
            (),
            {"model": ("grad", "tokenize"), "judge?": ("score",)},
            data,
        ),
    ]


@hookimpl
def tenfold_trainers():
    return [
        ComponentSpec(
            "learn",
            "toy_components:Learn",
            "learns a prefix",
            params=(
                Param("dataset", "component:dataset", "toy:numbers"),
                Param("word", "str", "hi"),
                Param("log", "str", "", identity=False),
                Param("steps", "int", 1, minimum=1),
            ),
        )
    ]
