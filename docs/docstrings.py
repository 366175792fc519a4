# Copyright 2026 The trl_diffusion authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""
Docstrings for the documentation site: from the convention of transformers and diffusers to Markdown.

mkdocstrings knows Google's and NumPy's conventions. This one is near Google's, but types are Markdown, parameters come
in groups ("> Parameters that control ..."), and references are written [`Name`].
"""

import re

import griffe


SECTION = re.compile(r"^(Args|Parameters|Attributes|Returns|Raises):$")
ITEM = re.compile(r"^    (\w[\w, `*()]*?)( \(.+\)):(.*)$|^    \*\*(\w+):(.*)$")
GROUP = re.compile(r"^    > (.+)$")
REFERENCE = re.compile(r"\[`(?:~[\w.]*\.)?([^`]+)`\](?![(\[])")  # [`~a.b.Name`] shows the last name only


def to_markdown(docstring: str) -> str:
    """Turn sections into bold headings, and their entries and groups into lists under subheadings."""
    lines, section = [], None
    for line in REFERENCE.sub(r"`\1`", docstring).splitlines():
        if match := SECTION.match(line):
            section = match[1]
            lines += [f"**{section}**", ""]
        elif section is None or (line and not line.startswith(" ")):
            section = None
            lines.append(line)
        elif match := GROUP.match(line):
            lines += ["", f"*{match[1]}*", ""]
        elif match := ITEM.match(line):
            name, kind, text, rest, text_of_rest = match.groups()
            lines.append(f"- **{name}**{kind}:{text}" if name else rf"- **\*\*{rest}**:{text_of_rest}")
        else:
            lines.append(line.removeprefix("    "))
    return "\n".join(lines)


class MarkdownDocstrings(griffe.Extension):
    """Applies [`to_markdown`] to every docstring of the package."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
