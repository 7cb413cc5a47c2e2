"""Receipts, invoices, forms and tables, as HTML for the browser, with what can be asked about them.

Layouts are numbered; those in HELD_OUT are drawn in evaluation alone.
"""

from collections.abc import Callable
from typing import Any

from numpy.random import Generator

from projects.casa_smol.tasks.asked import Turn, some, turn
from projects.casa_smol.tasks.html import Html, faces_for, safe
from projects.casa_smol.tasks.things import Money, Things
from projects.casa_smol.words import Words, pick

Drawing = tuple[Html, tuple[Turn, ...]]
LAYOUTS, HELD_OUT = 8, (6, 7)


def _layout(rng: Generator, split: str) -> int:
    return int(pick(rng, [n for n in range(LAYOUTS) if (n in HELD_OUT) == (split == "held_out")]))


def _colour(rng: Generator, low: int, high: int) -> str:
    return "#" + "".join(f"{int(v):02x}" for v in rng.integers(low, high, 3))


def _paper(rng: Generator) -> str:
    """Colours, size and space of a document's page."""
    light = rng.random() < 0.88
    paper = ("#fff" if rng.random() < 0.5 else _colour(rng, 225, 256)) if light else _colour(rng, 10, 50)
    ink = _colour(rng, 0, 70) if light else _colour(rng, 200, 256)
    size = int(rng.integers(12, 21))
    return (
        f"background: {paper}; color: {ink}; font: {size}px/{rng.uniform(1.15, 1.6):.2f} face(text); "
        f"padding: {rng.integers(8, 36)}px;"
    )


def _strong(rng: Generator) -> str:
    """A colour for heads and rules, and the ink on it."""
    return f"background: {_colour(rng, 20, 140)}; color: #fff" if rng.random() < 0.5 else "border-bottom: 2px solid"


def _rows(rows: list[list[str]], head: list[str] | None = None, numeric: int = 1) -> str:
    """A table; from column `numeric` on, cells stand at the right."""

    def cells(values: list[str], kind: str) -> str:
        return "".join(
            f"<{kind}{' class=n' if place >= numeric else ''}>{safe(value)}</{kind}>"
            for place, value in enumerate(values)
        )

    top = f"<thead><tr>{cells(head, 'th')}</tr></thead>" if head else ""
    lines = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f"<table>{top}<tbody>{lines}</tbody></table>"


def _table_css(rng: Generator) -> str:
    rules = pick(rng, ("", "td { border-bottom: 1px solid #8886 }", "td, th { border: 1px solid #8888 }",
                       "tr:nth-child(even) { background: #8882 }", "td { border-bottom: 1px dotted #888 }"))  # fmt: skip
    return (
        f"table {{ width: 100%; border-collapse: collapse; margin: {rng.integers(4, 16)}px 0 }} "
        f"td, th {{ padding: {rng.integers(1, 9)}px {rng.integers(2, 10)}px; text-align: left; vertical-align: top }} "
        f".n {{ text-align: right; white-space: nowrap }} th {{ {_strong(rng)} }} {rules}"
    )


def receipt(rng: Generator, split: str) -> Drawing:
    """A shop's receipt."""
    things, money, words, layout = Things(rng, split), Money(rng), Words(split), _layout(rng, split)
    shop, street, city, phone = things.shop(), things.street(), things.pick("cities"), things.phone()
    date, time, number = words.date(rng), words.time(rng), str(rng.integers(100, 99999))
    goods = things.distinct(int(rng.integers(2, 9)), things.good)
    counts = [int(n) if rng.random() < 0.4 else 1 for n in rng.integers(2, 7, len(goods))]
    each = [int(n) for n in rng.integers(50, int(pick(rng, (1000, 5000, 30000))), len(goods))]
    sums = [count * price for count, price in zip(counts, each, strict=True)]
    subtotal, rate = sum(sums), pick(rng, (0, 5, 7, 8, 10, 19, 20))
    tax = round(subtotal * rate / 100)
    total = subtotal + tax
    show = money.full if rng.random() < 0.6 else money.bare
    way, given = pick(rng, ("Cash", "Card", "Visa", "Mastercard", "Debit")), 0
    names = {"total": pick(rng, ("Total", "TOTAL", "Total due", "Amount", "Grand total", "To pay")),
             "tax": pick(rng, ("Tax", "VAT", "Sales tax")), "subtotal": pick(rng, ("Subtotal", "Sub-total", "Net"))}  # fmt: skip

    head = [f"<h2>{safe(shop)}</h2>", f"<div>{safe(street)}, {safe(city)}</div>", f"<div>{safe(phone)}</div>"]
    meta = [f"<div>{safe(pick(rng, ('Date: ', '', 'Date ')) + date)} {safe(time)}</div>",
            f"<div>{safe(pick(rng, ('Receipt', 'Receipt no.', 'Order', 'Ticket', 'No.')))} {number}</div>"]  # fmt: skip
    if layout % 2:
        rows = [[f"{count} x {good}", show(cost)] for good, count, cost in zip(goods, counts, sums, strict=True)]
        table = _rows(rows)
    elif layout % 4 == 0:
        rows = [[good, str(count), show(cost)] for good, count, cost in zip(goods, counts, sums, strict=True)]
        table = _rows(rows, ["Item", "Qty", pick(rng, ("Price", "Amount", "Sum"))])
    else:
        rows = [[good if count == 1 else f"{good} ({count})", show(cost)]
                for good, count, cost in zip(goods, counts, sums, strict=True)]  # fmt: skip
        table = _rows(rows)
    last = [[names["subtotal"], show(subtotal)], [f"{names['tax']} {rate}%", show(tax)]] if rate else []
    last.append([names["total"], show(total)])
    if way == "Cash":
        given = -(-total // 1000) * 1000
        last += [["Cash", show(given)], ["Change", show(given - total)]]
    elif rng.random() < 0.7:
        last.append([pick(rng, ("Paid by", "Payment", "Paid with")), way])
    feet = pick(rng, ("Thank you!", "Thank you for your visit", "Please come again", "Have a nice day", ""))
    align = ("center", "left", "center", "right")[layout % 4]
    middle = f"{''.join(meta)}{table}{_rows(last)}" if layout < 6 else f"{table}{_rows(last)}{''.join(meta)}"
    body = f"<header>{''.join(head)}</header>{middle}<footer>{feet}</footer>"
    css = (
        f"{_paper(rng)} {_table_css(rng)} header, footer {{ text-align: {align}; margin-bottom: 8px }} "
        f"h2 {{ margin: 0 0 4px; font-size: {rng.uniform(1.0, 1.7):.2f}em }} "
        f"table:last-of-type tr:last-child {{ font-size: {pick(rng, (1.0, 1.0, 1.25))}em }}"
    )
    html = Html(body, css, int(rng.integers(260, 460)), faces_for(rng, split))

    ask = [
        turn(rng, ("What is the total?", "How much is the total?", "What does it cost altogether?", "How much must be paid?",
                   "What is the total amount?", "What was the bill?"), *money.ways(total, show(total))),
        turn(rng, ("What is the date?", "When was this bought?", "Which date is on the receipt?", "On what day was it?"), date),
        turn(rng, ("What time is on the receipt?", "At what time was it?"), time),
        turn(rng, ("Which shop is this from?", "What is the name of the shop?", "Who issued the receipt?",
                   "Where was this bought?"), shop),
        turn(rng, ("What is the receipt number?", "Which number does the receipt have?"), number),
        turn(rng, ("What is the phone number?", "Which phone number is given?"), phone),
        turn(rng, ("In which city is the shop?", "Which city is it?"), city),
    ]  # fmt: skip
    for place in rng.permutation(len(goods))[:3].tolist():
        names_ = {"good": goods[place], "small": goods[place].lower()}
        ask.append(
            turn(
                rng,
                (
                    "How much is the {small}?",
                    "What does the {small} cost?",
                    'What is the price of "{good}"?',
                    "How much was paid for the {small}?",
                ),
                *money.ways(sums[place], show(sums[place])),
                **names_,
            )
        )
        ask.append(turn(rng, ("How many {small} were bought?", "What is the quantity of {small}?"), counts[place], **names_))  # fmt: skip
    costs = sorted(sums)
    if len(costs) > 1 and costs[-1] > costs[-2] and costs[0] < costs[1]:
        ask.append(
            turn(rng, ("Which item costs the most?", "What is the most expensive item?"), goods[sums.index(costs[-1])])
        )
        ask.append(
            turn(rng, ("Which item costs the least?", "What is the cheapest item?"), goods[sums.index(costs[0])])
        )
    ask.append(turn(rng, ("How many different items are there?", "How many items are listed?"), len(goods)))
    if rate:
        ask.append(turn(rng, ("How much is the tax?", "What is the tax?"), *money.ways(tax, show(tax))))
        ask.append(
            turn(rng, ("What is the subtotal?", "What is the sum before tax?"), *money.ways(subtotal, show(subtotal)))
        )
    if way == "Cash":
        change = given - total
        ask.append(turn(rng, ("How much change was given?", "What is the change?"), *money.ways(change, show(change))))
    elif way in str(last):
        ask.append(turn(rng, ("How was it paid?", "What was the payment method?", "How did they pay?"), way))
    return html, some(rng, ask, 7)


def invoice(rng: Generator, split: str) -> Drawing:
    """An invoice from one firm to another or to a person."""
    things, money, words, layout = Things(rng, split), Money(rng), Words(split), _layout(rng, split)
    sender, client = things.shop(), pick(rng, (things.person(), things.shop()))
    number = pick(rng, ("INV-", "", "2024-", "R", "#")) + str(rng.integers(100, 99999))
    date, due = words.date(rng), words.date(rng)
    goods = things.distinct(int(rng.integers(1, 6)), things.good)
    counts = [int(n) for n in rng.integers(1, 12, len(goods))]
    each = [int(n) * 5 for n in rng.integers(100, 9000, len(goods))]
    sums = [count * price for count, price in zip(counts, each, strict=True)]
    rate, net = pick(rng, (0, 7, 10, 19, 20, 21)), sum(sums)
    tax = round(net * rate / 100)
    show = money.full if rng.random() < 0.6 else money.bare
    iban = "".join(str(n) for n in rng.integers(0, 10, 12))
    rows = [[good, str(count), show(price), show(cost)]
            for good, count, price, cost in zip(goods, counts, each, sums, strict=True)]  # fmt: skip
    head = [pick(rng, ("Description", "Item", "Service")), "Qty", pick(rng, ("Unit price", "Price", "Rate")), "Amount"]
    last = [["Net", show(net)], [f"{pick(rng, ('VAT', 'Tax'))} {rate}%", show(tax)]] if rate else []
    last.append([pick(rng, ("Total", "TOTAL", "Amount due", "Balance due")), show(net + tax)])
    labels = {"number": pick(rng, ("Invoice no.", "Invoice number", "Invoice #", "No.")),
              "date": pick(rng, ("Date", "Issued", "Invoice date")), "due": pick(rng, ("Due", "Due date", "Pay by"))}  # fmt: skip
    meta = _rows([[labels["number"], number], [labels["date"], date], [labels["due"], due]], numeric=9)
    addresses = [f"<div><small>{label}</small><br><b>{safe(name)}</b><br>{safe(things.street())}<br>{safe(things.pick('cities'))}</div>"
                 for label, name in ((pick(rng, ("From", "Seller")), sender), (pick(rng, ("Bill to", "To", "Customer")), client))]  # fmt: skip
    parts = [f"<h1>{pick(rng, ('Invoice', 'INVOICE'))}</h1>", f"<section>{''.join(addresses)}</section>", meta]
    order = ((0, 1, 2), (1, 0, 2), (0, 2, 1), (2, 0, 1))[layout % 4]
    body = "".join(parts[place] for place in order) + _rows(rows, head) + f"<aside>{_rows(last)}</aside>"
    if layout % 3 == 0:
        body += f"<footer>Account: {iban}</footer>"
    css = (
        f"{_paper(rng)} {_table_css(rng)} section {{ display: flex; gap: 24px; "
        f"justify-content: {pick(rng, ('space-between', 'flex-start'))}; flex-direction: {'column' if layout >= 6 else 'row'} }} "
        f"aside {{ margin-left: auto; width: {rng.integers(45, 75)}% }} h1 {{ margin: 0 0 8px; font-size: 1.6em }} "
        f"aside tr:last-child {{ border-top: 2px solid }}"
    )
    html = Html(body, css, int(rng.integers(430, 700)), faces_for(rng, split))
    ask = [
        turn(rng, ("What is the total?", "How much is due?", "What is the amount due?", "How much does the client owe?"),
             *money.ways(net + tax, show(net + tax))),
        turn(rng, ("What is the invoice number?", "Which number does the invoice have?"), number, number.lstrip("#")),
        turn(rng, ("What is the date of the invoice?", "When was the invoice issued?"), date),
        turn(rng, ("When is it due?", "What is the due date?", "By when must it be paid?"), due),
        turn(rng, ("Who sent the invoice?", "Who is the seller?", "Which company is the invoice from?"), sender),
        turn(rng, ("Who is the invoice for?", "Who is the customer?", "Who has to pay?"), client),
        turn(rng, ("How many lines are billed?", "How many items does the invoice have?"), len(goods)),
    ]  # fmt: skip
    for place in rng.permutation(len(goods))[:2].tolist():
        names = {"small": goods[place].lower()}
        ask.append(
            turn(rng, ("What is the quantity of {small}?", "How many {small} are billed?"), counts[place], **names)
        )
        ask.append(
            turn(
                rng,
                ("What is the unit price of {small}?", "How much is one {small}?"),
                *money.ways(each[place], show(each[place])),
                **names,
            )
        )
        ask.append(turn(rng, ("What is the amount for {small}?", "How much is billed for {small}?"),
                        *money.ways(sums[place], show(sums[place])), **names))  # fmt: skip
    if rate:
        ask.append(turn(rng, ("How much is the tax?", "What is the tax amount?"), *money.ways(tax, show(tax))))
        ask.append(turn(rng, ("What is the tax rate?", "How many percent is the tax?"), f"{rate}%", rate))
    return html, some(rng, ask, 7)


def form(rng: Generator, split: str) -> Drawing:
    """A form somebody filled in."""
    things, words, layout = Things(rng, split), Words(split), _layout(rng, split)
    fields: dict[str, tuple[str, str]] = {
        "Name": ("name", things.person()), "Address": ("address", things.street()), "City": ("city", things.pick("cities")),
        "Country": ("country", things.pick("countries")), "Phone": ("phone number", things.phone()),
        "E-mail": ("e-mail address", things.email()), "Date of birth": ("date of birth", words.date(rng)),
        "Occupation": ("occupation", things.pick("jobs")), "Customer ID": ("customer ID", words.code(rng).split()[-1]),
        "Contact": ("contact", things.person()), "Room": ("room", str(rng.integers(1, 500))),
        "Department": ("department", things.topic()), "Postcode": ("postcode", str(rng.integers(10000, 99999))),
        "Signature": ("signature", things.pick("last")),
    }  # fmt: skip
    chosen = [list(fields)[int(place)] for place in rng.permutation(len(fields))[: rng.integers(4, 10)]]
    boxes = things.distinct(int(rng.integers(0, 5)), lambda: words.phrase(rng, 1, 2).capitalize())
    ticked = [bool(rng.random() < 0.5) for _ in boxes]
    title = f"{pick(rng, ('Registration', 'Application', 'Order', 'Membership', 'Booking', 'Contact'))} {pick(rng, ('form', 'sheet', 'card'))}"
    end = pick(rng, (":", "", ":"))
    shape = ("grid-template-columns: 40% 60%", "grid-template-columns: 1fr", "grid-template-columns: auto 1fr auto 1fr",
             "grid-template-columns: 30% 70%")[layout % 4]  # fmt: skip
    filled = "".join(f"<label>{safe(name)}{end}</label><p>{safe(fields[name][1])}</p>" for name in chosen)
    ticks = "".join(f"<li><i>{'✓' if on else ''}</i>{safe(name)}</li>" for name, on in zip(boxes, ticked, strict=True))
    line = pick(
        rng,
        ("border-bottom: 1px solid #888", "border: 1px solid #888", "background: #8882", "border-bottom: 1px dotted"),
    )
    body = f"<h2>{title}</h2><main>{filled}</main><ul>{ticks}</ul>"
    if layout >= 6:
        body = f"<h2>{title}</h2><ul>{ticks}</ul><main>{filled}</main>"
    css = (
        f"{_paper(rng)} main {{ display: grid; {shape}; gap: {rng.integers(3, 10)}px }} p {{ margin: 0; padding: 2px 6px; {line}; "
        f"font-family: face(pen), sans-serif; min-height: 1.4em }} ul {{ list-style: none; padding: 0 }} h2 {{ {_strong(rng)}; padding: 3px 6px }} "
        "i { display: inline-block; width: 1em; height: 1em; border: 1px solid; margin-right: 6px; line-height: 1em; font: 1em/1 sans-serif }"
    )
    html = Html(body, css, int(rng.integers(360, 640)), faces_for(rng, split, ("text", "pen")))
    ask = [turn(rng, ("What is the {field}?", "Which {field} is given?", "What does the form say under {label}?",
                      "What was filled in for {label}?"), fields[name][1], field=fields[name][0], label=name)
           for name in chosen]  # fmt: skip
    ask.append(turn(rng, ("What is the title of the form?", "What kind of form is this?"), title))
    for name, on in zip(boxes, ticked, strict=True):
        ask.append(turn(rng, ('Is "{name}" ticked?', 'Is the box "{name}" checked?'), "Yes" if on else "No", name=name))
    return html, some(rng, ask, 7)


def table(rng: Generator, split: str) -> Drawing:
    """A table of things and their numbers."""
    things, words, layout = Things(rng, split), Words(split), _layout(rng, split)
    kind, make = pick(rng, (("person", things.person), ("city", lambda: things.pick("cities")),
                            ("country", lambda: things.pick("countries")), ("product", things.good)))  # fmt: skip
    rows = things.distinct(int(rng.integers(3, 9)), make)
    columns: list[tuple[str, Callable[[], Any]]] = [
        ("Age", lambda: int(rng.integers(18, 90))), ("Points", lambda: int(rng.integers(0, 500))),
        ("Price", lambda: f"{rng.uniform(1, 300):.2f}"), ("Year", lambda: int(rng.integers(1950, 2027))),
        ("Stock", lambda: int(rng.integers(0, 3000))), ("Rank", lambda: int(rng.integers(1, 100))),
        ("Share", lambda: f"{rng.uniform(0, 60):.1f}%"), ("Visitors", lambda: f"{rng.integers(1000, 999999):,}"),
        ("Code", lambda: words.code(rng).split()[-1]), ("Date", lambda: words.date(rng)),
        ("Status", lambda: pick(rng, ("Open", "Closed", "Pending", "Done"))), ("Contact", things.person),
        ("City", lambda: things.pick("cities")), ("Weight", lambda: f"{rng.uniform(0.1, 90):.1f} kg"),
    ]  # fmt: skip
    columns = [column for column in columns if column[0] != kind.capitalize()]
    chosen = [columns[int(place)] for place in rng.permutation(len(columns))[: rng.integers(1, 5)]]
    values = [[str(draw()) for _, draw in chosen] for _ in rows]
    title = f"{things.topic()} {pick(rng, ('by', 'per'))} {kind}" if rng.random() < 0.6 else ""
    head = [kind.capitalize(), *(name for name, _ in chosen)]
    cells = _rows([[row, *own] for row, own in zip(rows, values, strict=True)], head, numeric=1 if layout % 2 else 9)
    body = (
        (f"<h3>{safe(title)}</h3>" if title and layout < 6 else "")
        + cells
        + (f"<h4>{safe(title)}</h4>" if title and layout >= 6 else "")
    )
    html = Html(body, f"{_paper(rng)} {_table_css(rng)}", int(rng.integers(340, 760)), faces_for(rng, split))
    ask = []
    for _ in range(5):
        row, column = int(rng.integers(len(rows))), int(rng.integers(len(chosen)))
        names = {"row": rows[row], "column": chosen[column][0], "small": chosen[column][0].lower()}
        ask.append(turn(rng, ("What is the {small} of {row}?", "Which {small} does {row} have?", "{column} of {row}?",
                              "What does the table give as {small} for {row}?"), values[row][column], **names))  # fmt: skip
        if [own[column] for own in values].count(values[row][column]) == 1:
            ask.append(turn(rng, ("Which {kind} has the {small} {value}?", "Whose {small} is {value}?"), rows[row],
                            kind=kind, value=values[row][column], **names))  # fmt: skip
    for column, (name, _) in enumerate(chosen):
        if name in ("Age", "Points", "Year", "Stock", "Rank"):
            numbers = [int(own[column]) for own in values]
            for best, word in ((max(numbers), "highest"), (min(numbers), "lowest")):
                if numbers.count(best) == 1:
                    ask.append(turn(rng, ("Which {kind} has the {word} {small}?", "Who or what has the {word} {small}?"),
                                    rows[numbers.index(best)], kind=kind, word=word, small=name.lower()))  # fmt: skip
    ask.append(
        turn(rng, ("How many rows does the table have?", "How many {kind} entries are there?"), len(rows), kind=kind)
    )
    if title:
        ask.append(turn(rng, ("What is the title of the table?", "What is the table about?"), title))
    return html, some(rng, ask, 7)


DOCUMENTS: dict[str, Callable[[Generator, str], Drawing]] = {
    "receipt": receipt,
    "invoice": invoice,
    "form": form,
    "table": table,
}
