"""Makes bindings in which functions are one table of pointers, filled at run time.

Enumerations become integers, so that a value which a newer library adds is no undefined behaviour.
Needs bindgen (cargo install bindgen-cli --version 0.71.1) and the libclang that bindgen needs;
neither is needed to build the project.
"""

import pathlib
import re
import subprocess
import sys


def make(library, include, header, functions, types, values, options=()):
    """Writes src/LIBRARY/bindings.rs from INCLUDE/HEADER; all else are lists of patterns."""
    raw = subprocess.run(
        ["bindgen", f"{include}/{header}", "--default-enum-style=consts",
         "--no-prepend-enum-name", "--no-doc-comments", "--ctypes-prefix=libc",
         "--rust-edition=2024", "--rust-target=1.85", "--merge-extern-blocks", "--no-layout-tests",
         *options, "--allowlist-function", "|".join(functions), "--allowlist-type",
         "|".join(types), "--allowlist-var", "|".join(values), "--", f"-I{include}"],
        check=True, stdout=subprocess.PIPE, text=True).stdout
    kept, pointers = [], []
    for item in re.split(r"\n(?=pub |#\[|unsafe extern|use )", raw):
        if item.startswith("unsafe extern"):
            for function in re.findall(r"pub fn (\w+)\((.*?)\)(?: -> (.*?))?;", item, re.S):
                name, arguments, returns = function
                split = [argument.split(":", 1)[1] for argument
                         in re.split(r",\s*(?=\w+: )", arguments) if ":" in argument]
                split = [" ".join(t.split()).rstrip(",") for t in split]
                returns = f" -> {' '.join(returns.split())}" if returns else ""
                pointers.append((name, f"unsafe extern \"C\" fn({', '.join(split)}){returns}"))
        else:
            kept.append(item)
    missing = set(functions) - {name for name, _ in pointers}
    if missing:
        sys.exit(f"not in the headers: {sorted(missing)}")
    wanted = re.compile("|".join(f"(?:{value})" for value in values))
    body = [i for i in kept
            if not re.match(r"pub const \w+: ", i)
            or wanted.fullmatch(re.match(r"pub const (\w+)", i).group(1))]
    text = f"//! Types, values and functions of {header}, made by a script of `bindings/`: do\n"
    text += "//! not edit.\n\n"
    text += re.sub(r"/\* automatically generated.*?\*/\n", "", "\n".join(body))
    text += "\n\nfunctions! {\n" + "".join(f"    {n}: {t},\n" for n, t in pointers) + "}\n"
    out = pathlib.Path(__file__).resolve().parent.parent / f"src/{library}/bindings.rs"
    out.write_text(text)
    subprocess.run(["rustfmt", "--edition", "2024", str(out)], check=True)
