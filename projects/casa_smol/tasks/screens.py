"""Screens of programs and pages, as HTML: windows, dialogs, logins, settings, lists, terminals."""

from collections.abc import Callable
from typing import Any

from numpy.random import Generator

from projects.casa_smol.canvas import COLOURS, colour_of
from projects.casa_smol.tasks.asked import Turn, some, turn
from projects.casa_smol.tasks.documents import Drawing
from projects.casa_smol.tasks.html import Html, faces_for, safe
from projects.casa_smol.tasks.things import Things
from projects.casa_smol.words import Words, pick

_ACTIONS = """Save Cancel Open Close Delete Send Print Copy Paste Undo Redo Search Submit Next Back Continue Retry
Login Download Upload Export Import Refresh Apply Reset Edit Share Help Install Update Remove Add Connect Play Pause
Stop Start Confirm Accept Decline Ignore Skip Finish Archive Rename Move Filter Sort View Settings Options"""
_SETTINGS = """Notifications Wi-Fi Bluetooth Dark-mode Location Autosave Sounds Vibration Sync Backup Updates
Spelling Cookies Subtitles Captions Roaming Airplane-mode Night-light Encryption Logging Animations Previews"""
WHERE = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")


def _rgb(rng: Generator, dark: bool) -> tuple[int, int, int]:
    low, high = (10, 70) if dark else (215, 256)
    return tuple(int(v) for v in rng.integers(low, high, 3))  # type: ignore[return-value]


def _css(rgb: Any) -> str:
    return f"rgb({rgb[0]},{rgb[1]},{rgb[2]})"


class Look:
    """Colours and measures of one screen."""

    def __init__(self, rng: Generator) -> None:
        self.dark = rng.random() < 0.35
        self.ground, self.panel = _rgb(rng, self.dark), _rgb(rng, self.dark)
        self.ink = _css((235, 235, 235) if self.dark else rng.integers(0, 60, 3))
        self.accent = tuple(
            int(v) for v in rng.permutation([30, int(rng.integers(60, 140)), int(rng.integers(140, 230))])
        )
        self.size, self.round = int(rng.integers(12, 19)), int(rng.integers(0, 14))
        self.css = (
            f"background: {_css(self.ground)}; color: {self.ink}; font: {self.size}px/1.35 face(text); position: relative; "
            f".bar {{ background: {_css(self.accent)}; color: #fff; padding: {rng.integers(4, 12)}px 12px; display: flex; "
            f"justify-content: space-between }} .panel {{ background: {_css(self.panel)}; padding: 10px; border-radius: {self.round}px; "
            f"border: 1px solid #8885 }} b.go {{ font-weight: {pick(rng, (400, 700))}; display: inline-block; border-radius: {self.round}px; "
            f"padding: {rng.integers(3, 9)}px {rng.integers(8, 20)}px; border: 1px solid #8887; margin: 3px }} "
            "b.first { color: #fff; border: 0 } input { font: inherit; padding: 4px 8px; border: 1px solid #888; background: #fff2; "
            f"color: inherit; border-radius: {min(self.round, 6)}px; width: 100% }} .row {{ display: flex; align-items: center; "
            "justify-content: space-between; padding: 5px 8px; gap: 12px } .row + .row { border-top: 1px solid #8884 } h2, h3, p { margin: 4px 0 8px }"
        )


def _buttons(look: Look, labels: list[str]) -> str:
    first = f' style="background: {_css(look.accent)}"'
    return "".join(
        f'<b class="go{" first" if not place else ""}"{first if not place else ""}>{safe(label)}</b>'
        for place, label in enumerate(labels)
    )


def _asked_of_buttons(rng: Generator, look: Look, labels: list[str]) -> list[Turn]:
    listed = ", ".join(labels)
    return [
        turn(rng, ("Which buttons are there?", "Name the buttons.", "What buttons can be pressed?"), listed),
        turn(rng, ("How many buttons are there?", "Count the buttons."), len(labels)),
        turn(rng, ("Which button is coloured?", "Which button stands out?", "What does the {colour} button say?"), labels[0],
             colour=COLOURS[colour_of(look.accent)]),  # type: ignore[arg-type]
        turn(rng, ("What colour is the {label} button?", 'Which colour has the button "{label}"?'),
             COLOURS[colour_of(look.accent)], label=labels[0]),  # type: ignore[arg-type]
    ]  # fmt: skip


def dialog(rng: Generator, split: str) -> Drawing:
    """A message with a title, a sentence and buttons."""
    things, words, look = Things(rng, split), Words(split), Look(rng)
    title, text = words.phrase(rng, 1, 4), words.sentence(rng)
    labels = things.distinct(int(rng.integers(1, 4)), lambda: pick(rng, _ACTIONS.split()))
    align = pick(rng, ("left", "right", "center"))
    around = f"padding: {rng.integers(16, 60)}px {rng.integers(16, 80)}px"
    body = (f'<div class="bar"><span>{safe(title)}</span><span>×</span></div><div class="panel"><p>{safe(text)}</p>'
            f'<div style="text-align:{align}">{_buttons(look, labels)}</div></div>')  # fmt: skip
    html = Html(f"<div>{body}</div>", f"{look.css} {around}", int(rng.integers(330, 600)), faces_for(rng, split))
    ask = [
        turn(rng, ("What does the title say?", "What is the title of the window?", "What is written in the title bar?"), title),
        turn(rng, ("What does the message say?", "Read the message.", "What is the text of the dialog?"), text),
        *_asked_of_buttons(rng, look, labels),
    ]  # fmt: skip
    return html, some(rng, ask, 6)


def login(rng: Generator, split: str) -> Drawing:
    """A form to sign in or up, its fields filled or empty."""
    things, words, look = Things(rng, split), Words(split), Look(rng)
    names = {"Username": things.pick("first").lower() + str(rng.integers(1, 99)), "E-mail": things.email(), "Phone": things.phone(),
             "City": things.pick("cities"), "Company": things.shop(), "Search": words.phrase(rng, 1, 3)}  # fmt: skip
    chosen = [list(names)[int(place)] for place in rng.permutation(len(names))[: rng.integers(1, 4)]]
    empty = [bool(rng.random() < 0.25) for _ in chosen]
    title = pick(rng, ("Sign in", "Log in", "Create account", "Welcome back", words.phrase(rng, 1, 3)))
    labels = things.distinct(int(rng.integers(1, 3)), lambda: pick(rng, _ACTIONS.split()))
    fields = "".join(
        f'<p>{name}<br><input value="{"" if none else safe(names[name]).replace(chr(34), "")}"></p>'
        for name, none in zip(chosen, empty, strict=True)
    )
    link = pick(rng, ("Forgot password?", "Need help?", "Privacy", "Terms of use"))
    body = f'<div class="panel"><h2>{safe(title)}</h2>{fields}{_buttons(look, labels)}<p><u>{link}</u></p></div>'
    html = Html(
        body, f"{look.css} padding: {rng.integers(10, 60)}px", int(rng.integers(300, 520)), faces_for(rng, split)
    )
    ask = [
        turn(rng, ("What does the title say?", "What is the heading?", "What is this form for?"), title),
        turn(rng, ("Which link is shown?", "What does the link say?"), link),
        *_asked_of_buttons(rng, look, labels),
    ]
    for name, none in zip(chosen, empty, strict=True):
        if none:
            ask.append(turn(rng, ("Which field is empty?", "What has not been filled in?"), name))
        else:
            ask.append(turn(rng, ("What is in the field {name}?", "What was typed for {name}?", "What is the {small}?"),
                            names[name].replace('"', ""), name=name, small=name.lower()))  # fmt: skip
    if sum(empty) > 1:
        ask = [one for one in ask if one.answers[0] not in chosen]
    return html, some(rng, ask, 6)


def switches(rng: Generator, split: str) -> Drawing:
    """Settings that are on or off, and some with a value."""
    things, words, look = Things(rng, split), Words(split), Look(rng)
    names = things.distinct(int(rng.integers(3, 8)), lambda: pick(rng, (pick(rng, _SETTINGS.split()).replace("-mode", " mode"),
                                                                        words.phrase(rng, 1, 2).capitalize())))  # fmt: skip
    states = [bool(rng.random() < 0.5) for _ in names]
    shown = pick(rng, ("switch", "word", "box"))
    title = pick(rng, ("Settings", "Preferences", "Options", words.phrase(rng, 1, 2)))

    def state(on: bool) -> str:
        if shown == "word":
            return "On" if on else "Off"
        if shown == "box":
            return f'<span style="border:1px solid;width:1.2em;height:1.2em;text-align:center;line-height:1.2em">{"✓" if on else ""}</span>'
        colour, side = (_css(look.accent), "flex-end") if on else ("#999", "flex-start")
        return (f'<span style="background:{colour};width:2.4em;height:1.3em;border-radius:1em;display:flex;padding:2px;'
                f'justify-content:{side}"><i style="background:#fff;width:1em;border-radius:1em"></i></span>')  # fmt: skip

    rows = "".join(
        f'<div class="row"><span>{safe(n)}</span>{state(on)}</div>' for n, on in zip(names, states, strict=True)
    )
    html = Html(f'<div class="bar"><span>{safe(title)}</span></div><div class="panel">{rows}</div>',
                f"{look.css} padding: {rng.integers(0, 30)}px", int(rng.integers(280, 520)), faces_for(rng, split))  # fmt: skip
    ask = [turn(rng, ("What does the title say?", "What is the heading?"), title),
           turn(rng, ("How many settings are on?", "How many are switched on?"), sum(states)),
           turn(rng, ("How many settings are shown?", "How many settings are there?"), len(names))]  # fmt: skip
    for name, on in zip(names, states, strict=True):
        ask.append(
            turn(
                rng, ("Is {name} on?", "Is {name} switched on?", "Is {name} enabled?"), "Yes" if on else "No", name=name
            )
        )
    if sum(states) == 1:
        ask.append(turn(rng, ("Which setting is on?", "What is switched on?"), names[states.index(True)]))
    if sum(states) == len(states) - 1:
        ask.append(turn(rng, ("Which setting is off?", "What is switched off?"), names[states.index(False)]))
    return html, some(rng, ask, 6)


def window(rng: Generator, split: str) -> Drawing:
    """A program: menu, tabs, a list beside its text, a line of state; a button in one of nine places."""
    things, words, look = Things(rng, split), Words(split), Look(rng)
    title = f"{things.word().capitalize()} - {pick(rng, ('Editor', 'Mail', 'Files', 'Notes', 'Player', 'Studio'))}"
    tabs = things.distinct(int(rng.integers(2, 5)), lambda: words.phrase(rng, 1, 1).capitalize())
    active = int(rng.integers(len(tabs)))
    items = things.distinct(
        int(rng.integers(3, 8)), lambda: pick(rng, (words.phrase(rng, 1, 2), words.address(rng), things.person()))
    )
    chosen = int(rng.integers(len(items)))
    text, state = words.sentence(rng), words.phrase(rng, 1, 3)
    place, label = int(rng.integers(9)), pick(rng, _ACTIONS.split())
    width, height = int(rng.integers(440, 760)), int(rng.integers(300, 520))
    vertical, sideways = ("start", "center", "end")[place // 3], ("start", "center", "end")[place % 3]
    strip = "".join(
        f'<span style="padding:4px 10px;{f"border-bottom:3px solid {_css(look.accent)};font-weight:700" if n == active else "opacity:.75"}">'
        f"{safe(tab)}</span>" for n, tab in enumerate(tabs)
    )  # fmt: skip
    listed = "".join(
        f'<div style="padding:3px 6px;{f"background:{_css(look.accent)};color:#fff" if n == chosen else ""}">{safe(item)}</div>'
        for n, item in enumerate(items)
    )
    button = f'<b class="go first" style="background:{_css(look.accent)};place-self:{vertical} {sideways}">{label}</b>'
    body = (
        f'<div class="bar"><span>{safe(title)}</span><span>–  ×</span></div><div>{strip}</div>'
        f'<div style="display:flex;gap:8px;padding:8px"><div style="flex:0 0 42%;overflow:hidden;white-space:nowrap">{listed}</div><div>{safe(text)}</div></div>'
        f'<div style="display:grid;flex:1;padding:6px">{button}</div><div style="border-top:1px solid #8886;padding:3px 8px">{safe(state)}</div>'
    )
    css = f"{look.css} height: {height}px; display: flex; flex-direction: column"
    html = Html(body, css, width, faces_for(rng, split))
    ask = [
        turn(rng, ("What does the title say?", "What is written in the title bar?", "Which window is this?"), title),
        turn(rng, ("Which tab is active?", "Which tab is open?", "Which tab is selected?"), tabs[active]),
        turn(rng, ("How many tabs are there?", "Count the tabs."), len(tabs)),
        turn(rng, ("Which entry of the list is selected?", "What is highlighted in the list?", "Which item is marked?"), items[chosen]),
        turn(rng, ("What does the status line say?", "What is written at the very bottom?"), state),
        turn(rng, ("What does the button say?", "Which button is there?"), label),
        turn(rng, ("Where is the {label} button?", 'At which place is the button "{label}"?', "Where can one press {label}?"),
             WHERE[place], f"at the {WHERE[place]}", label=label),
        turn(rng, ("How many entries does the list have?", "How many items are in the list?"), len(items)),
    ]  # fmt: skip
    return html, some(rng, ask, 6)


def terminal(rng: Generator, split: str) -> Drawing:
    """Commands and what they print."""
    things, words, look = Things(rng, split), Words(split), Look(rng)
    lines, commands = [], []
    user = f"{things.pick('first').lower()}@{things.word()}"
    for _ in range(int(rng.integers(1, 5))):
        name = things.word()
        command = pick(rng, ("ls", f"cd {name}", f"cat {name}.txt", f"mkdir {name}", f"git commit -m '{name}'", f"python {name}.py",
                             f"rm {name}.log", "make test", f"grep {name} *.md", "df -h"))  # fmt: skip
        commands.append(command)
        lines.append(f"{user}:~$ {command}")
        lines += [
            pick(rng, (words.sentence(rng), words.address(rng), f"error: {words.phrase(rng)}"))
            for _ in range(int(rng.integers(0, 4)))
        ]
    lines.append(f"{user}:~$ ")
    text = "<br>".join(map(safe, lines))
    ink = pick(rng, ("#ddd", "#7f7", "#fc6", "#fff"))
    css = f"background: {_css(rng.integers(0, 45, 3))}; color: {ink}; font: {look.size}px/1.4 face(text); padding: 10px"
    html = Html(f"<div>{text}</div>", css, int(rng.integers(420, 800)), faces_for(rng, split))
    number = int(rng.integers(len(lines) - 1))
    ask = [
        turn(rng, ("Which command was run last?", "What is the last command?"), commands[-1]),
        turn(rng, ("Which command was run first?", "What is the first command?"), commands[0]),
        turn(rng, ("Who is the user?", "What does the prompt begin with?"), user),
        turn(rng, ("How many commands were run?", "Count the commands."), len(commands)),
    ]
    if not lines[number].startswith(user):
        before = lines[number - 1].removeprefix(f"{user}:~$ ")
        ask.append(
            turn(
                rng, ('What is printed after "{line}"?', 'Which line comes below "{line}"?'), lines[number], line=before
            )
        )
    return html, some(rng, ask, 5)


SCREENS: dict[str, Callable[[Generator, str], Drawing]] = {
    "dialog": dialog,
    "login": login,
    "settings": switches,
    "window": window,
    "terminal": terminal,
}
