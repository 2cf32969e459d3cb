"""Print the completion of `ddpm` for a shell: eval "$(ddpm completion bash)" in ~/.bashrc, or with zsh in ~/.zshrc,
or ddpm completion fish | source in ~/.config/fish/config.fish
"""

import importlib.resources
import io
import os
import re
import sys
from contextlib import redirect_stdout, suppress

from ddpm import cli, presets
from ddpm.commands import COMMANDS
from ddpm.data import catalog

# bash splits words at colons, and replaces what is behind the last one. -o default: files, where no word fits.
BASH = r"""_ddpm() {
    local line=${COMP_LINE:0:$COMP_POINT} words="%s"
    local cur=${line##* } rest=${line#* }
    case $rest in
%s    esac
    [[ $cur == -* || ${rest#* } == "$cur" ]] || words=
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
    [[ ${COMP_WORDBREAKS-} != *:* ]] || COMPREPLY=("${COMPREPLY[@]#"${cur%%"${cur##*:}"}"}")
}
complete -o default -F _ddpm ddpm"""
ZSH = f"autoload -U +X compinit bashcompinit && compinit && bashcompinit\n{BASH}"
# fish completes files where the condition of -f is false: where no word fits.
FISH = r"""function _ddpm
    set -l line (commandline -opc)
    set -l cur "$(commandline -ct)"
    set -l words %s
    switch "$line[2]"
%s    end
    string match -q -- "-*" $cur || test (count $line) -lt 3 || return
    string match -- "$cur*" $words
end
complete -c ddpm -n _ddpm -f -a '(_ddpm)'"""
CASE = '        "%s "*) words="%s" ;;\n'
SHELLS = {"bash": (BASH, CASE), "zsh": (ZSH, CASE), "fish": (FISH, "        case %s; set words %s\n")}


def main() -> None:
    script, case = SHELLS[cli.chosen("SHELL", dict.fromkeys(SHELLS, ""), __doc__)]
    nets = sorted(f"builtin:{net.name}" for net in (importlib.resources.files("ddpm.hub") / "nets").iterdir())
    first = dict.fromkeys(("sample", "evaluate", "export", "card"), nets)
    first |= {"train": [*presets.PRESETS], "search": [*presets.PRESETS], "prepare": catalog.names()}
    cases = case % ("completion", " ".join(SHELLS))
    for name in sorted(COMMANDS.keys() - {"completion"}):
        words = first.get(name, [])
        heads = words if name == "prepare" else words[:1] or [""]  # each source has flags of its own
        options = dict.fromkeys(flag for head in heads for flag in flags(name, head))
        cases += case % (name, " ".join([*words, *options]))
    print(script % (" ".join(COMMANDS), cases))


def flags(command: str, first: str) -> list[str]:
    """The flags that the help of `ddpm COMMAND FIRST` lists."""
    sys.argv = [f"ddpm {command}", first, "--help-all"]
    os.environ["COLUMNS"] = "100"  # narrow frames break flags; wide ones stand side by side
    with redirect_stdout(io.StringIO()) as text, suppress(SystemExit):
        importlib.import_module(f"ddpm.commands.{command}").main()
    rows = re.findall(r"^\W (-.*)", text.getvalue(), re.MULTILINE)  # explanations are indented more
    return [cli.HELP_ALL, *re.findall(r"--\w[\w.-]*", " ".join(rows))]
