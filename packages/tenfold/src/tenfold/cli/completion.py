"""`tenfold completion SHELL`: a script that completes commands, actions and file names."""

from __future__ import annotations

import argparse

from tenfold.cli import COMMANDS
from tenfold.cli.output import print_json
from tenfold.errors import EXIT_OK
from tenfold.registry import load_registry

SUMMARY = "print a completion script for your shell"

_ACTIONS = {
    "plugins": ("list", "show", "check", "enable", "disable"),
    "list": ("models", "datasets", "evaluators", "trainers"),
    "recipes": ("list", "show"),
    "runs": ("list", "show", "diff", "rescore", "merge", "export", "rm"),
    "init": ("plugin",),
    "workspace": ("check",),
    "completion": ("bash", "zsh", "fish"),
}

_BASH = """\
_tenfold() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" words=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    words="{commands}"
  elif [ "$COMP_CWORD" -eq 2 ]; then
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
  fi
  mapfile -t COMPREPLY < <(compgen -W "$words" -- "$current")
  if [ ${{#COMPREPLY[@]}} -eq 0 ]; then
    mapfile -t COMPREPLY < <(compgen -f -- "$current")
  fi
}}
complete -o filenames -F _tenfold tenfold
"""

_ZSH = """\
#compdef tenfold
_tenfold() {{
  if (( CURRENT == 2 )); then
    compadd -- {commands}
  elif (( CURRENT == 3 )); then
    case "$words[2]" in
{cases}
      *) _files ;;
    esac
  else
    _files
  fi
}}
compdef _tenfold tenfold
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the shell's name."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="which shell")


def run(args: argparse.Namespace) -> int:
    """Prints the script."""
    script = completion_script(args.shell, _words())
    if args.json:
        print_json({"shell": args.shell, "script": script})
    else:
        print(script, end="")
    return EXIT_OK


def completion_script(shell: str, words: dict[str, tuple[str, ...]]) -> str:
    """The script for a shell, from first words and what may follow each."""
    commands = " ".join(words)
    if shell == "fish":
        lines = [f"complete -c tenfold -n __fish_use_subcommand -a '{commands}'"]
        lines += [
            f"complete -c tenfold -n '__fish_seen_subcommand_from {name}' -a '{' '.join(after)}'"
            for name, after in words.items()
            if after
        ]
        return "\n".join(lines) + "\n"
    form = (
        '      {name}) words="{after}" ;;'
        if shell == "bash"
        else "      {name}) compadd -- {after} ;;"
    )
    cases = "\n".join(
        form.format(name=name, after=" ".join(after)) for name, after in words.items() if after
    )
    template = _BASH if shell == "bash" else _ZSH
    return template.format(commands=commands, cases=cases)


def _words() -> dict[str, tuple[str, ...]]:
    """First word → words that may follow it; plugins' commands included."""
    words: dict[str, tuple[str, ...]] = {name: _ACTIONS.get(name, ()) for name in COMMANDS}
    for plugin, specs in load_registry(lenient=True).command_specs.items():
        words.setdefault(plugin, tuple(spec.name for spec in specs))
    return words
