"""What documents, charts and screens are about: goods, names, places; each list split as words are."""

from typing import Any

from numpy.random import Generator

from projects.casa_smol.words import Words, is_held_out, pick

_GOODS = """Tea Coffee Espresso Latte Cappuccino Milk Bread Butter Cheese Yoghurt Eggs Rice Pasta Flour Sugar Salt
Pepper Honey Jam Apples Bananas Oranges Lemons Grapes Pears Plums Cherries Berries Tomatoes Potatoes Onions Carrots
Spinach Lettuce Cabbage Beans Peas Lentils Soup Salad Sandwich Burger Pizza Noodles Curry Steak Chicken Fish Shrimp
Bacon Ham Sausage Tofu Cookies Cake Muffin Croissant Donut Chocolate Candy Chips Nuts Crackers Cereal Oatmeal Juice
Soda Water Lemonade Beer Wine Cider Candles Soap Shampoo Toothpaste Towels Tissues Batteries Lamp Bulb Cable Charger
Adapter Notebook Pencil Pens Eraser Stapler Envelope Folder Paper Scissors Tape Glue Paint Brush Hammer Nails Screws
Drill Saw Ladder Bucket Broom Mop Gloves Apron Hat Scarf Socks Shirt Jacket Jeans Boots Sandals Umbrella Backpack
Wallet Belt Watch Chair Table Desk Shelf Mirror Carpet Curtain Pillow Blanket Mattress Kettle Toaster Blender Plate
Bowl Mug Glass Fork Spoon Knife Pan Pot Tray Basket Vase Clock Radio Speaker Headphones Keyboard Mouse Monitor
Printer Camera Tripod Phone Tablet Laptop Router Hosting Design Consulting Training Repair Delivery Cleaning
Painting Installation Translation Maintenance Licence Support Workshop Rental Transport Storage Insurance
Advertising Photography Editing Printing"""
_KINDS = """Green Black White Red Large Small Fresh Organic Hot Iced Double Classic Vegan Spicy Sweet Salted Smoked
Wooden Steel Plastic Leather Cotton Premium Basic Deluxe Mini Travel Family Garden Office Kitchen Winter Summer"""
_FIRST = """Anna Ben Clara David Emma Felix Grace Henry Ivy Jack Kate Leo Mia Noah Olga Paul Quinn Rosa Sam Tina Uma
Victor Wendy Xander Yara Zoe Amir Bella Carlos Diana Erik Fatima George Hana Ivan Julia Karim Lena Marco Nadia Oscar
Petra Rafael Sofia Tomas Ursula Vera Walter Yusuf Zara Alice Boris Chen Dora Elias Flora Gina Hugo Irene Jonas"""
_LAST = """Miller Baker Cook Fisher Carter Mason Taylor Turner Walker Young Wright Hill Green Adams Nelson Campbell
Roberts Phillips Evans Parker Collins Stewart Morris Murphy Rogers Reed Bailey Bell Cooper Richardson Cox Ward
Peterson Gray James Watson Brooks Kelly Sanders Price Bennett Wood Barnes Ross Henderson Cole Jenkins Perry Powell
Long Hughes Novak Schmidt Rossi Garcia Silva Kim Tanaka Singh Haddad Larsen Dubois Kowalski"""
_CITIES = """London Paris Berlin Madrid Rome Vienna Prague Lisbon Oslo Dublin Athens Warsaw Helsinki Zurich Geneva
Milan Porto Lyon Hamburg Munich Bristol Leeds Boston Chicago Denver Seattle Austin Dallas Phoenix Toronto Montreal
Sydney Perth Auckland Tokyo Osaka Seoul Mumbai Delhi Cairo Lagos Nairobi Lima Bogota Santiago Havana Quito Riga
Tallinn Vilnius Ghent Bergen Malmo Turku Graz Basel Turin Naples Seville Bilbao Krakow Brno"""
_COUNTRIES = """France Germany Spain Italy Austria Poland Portugal Norway Sweden Finland Denmark Ireland Greece
Hungary Romania Bulgaria Croatia Serbia Estonia Latvia Lithuania Belgium Switzerland Canada Mexico Brazil Argentina
Chile Peru Colombia Japan China India Korea Vietnam Thailand Indonesia Australia Egypt Morocco Kenya Nigeria Ghana
Turkey Iran Israel"""
_JOBS = """Teacher Nurse Engineer Baker Lawyer Painter Driver Farmer Doctor Chemist Writer Editor Designer Plumber
Carpenter Electrician Accountant Librarian Pilot Chef Waiter Actor Dancer Singer Manager Analyst Architect Dentist"""
_SHOPS = """Market Store Shop Cafe Bakery Bistro Deli Grocery Hardware Books Pharmacy Supplies Trading Kitchen"""
_TOPICS = """Sales Profit Revenue Costs Visitors Users Orders Output Rainfall Temperature Population Exports Imports
Score Speed Energy Traffic Savings Downloads Members Passengers Emissions Harvest Budget"""


def _split(text: str) -> dict[str, tuple[str, ...]]:
    names = text.split()
    held_out = tuple(filter(is_held_out, names))
    return {"train": tuple(name for name in names if name not in held_out), "held_out": held_out}


LISTS = {
    "goods": _split(_GOODS), "first": _split(_FIRST), "last": _split(_LAST), "cities": _split(_CITIES),
    "countries": _split(_COUNTRIES), "jobs": _split(_JOBS),
}  # fmt: skip


class Things:
    """Draws names of one split. Lists are short, so held-out names make up half of what is drawn in evaluation."""

    def __init__(self, rng: Generator, split: str) -> None:
        self.rng, self.split, self.words = rng, split, Words(split)

    def pick(self, name: str) -> str:
        """One of a list in LISTS."""
        split = self.split if self.rng.random() < 0.5 else "train"
        return pick(self.rng, LISTS[name][split] or LISTS[name]["train"])

    def good(self) -> str:
        """Something that is sold: "Green tea", "Tea", "Printer cable"."""
        kind, name = self.rng.random(), self.pick("goods")
        if kind < 0.45:
            return name
        if kind < 0.8:
            return f"{pick(self.rng, _KINDS.split())} {name.lower()}"
        return f"{self.word().capitalize()} {name.lower()}"

    def word(self) -> str:
        """A word without an apostrophe, in small letters."""
        return self.words.word(self.rng).lower().partition("'")[0]

    def distinct(self, count: int, make: Any) -> list[str]:
        """So many different ones, none of which is part of another; fewer where there are not enough."""
        found: list[str] = []
        for _ in range(40 * count):
            if len(found) == count:
                break
            one = make()
            if not any(one.lower() in other.lower() or other.lower() in one.lower() for other in found):
                found.append(one)
        return found

    def person(self) -> str:
        """First and last name."""
        return f"{self.pick('first')} {self.pick('last')}"

    def shop(self) -> str:
        """The name of a shop or firm."""
        rng, kind = self.rng, self.rng.random()
        if kind < 0.4:
            others = pick(rng, ("Sons", "Co", "Partners", self.pick("last")))
            return f"{self.pick('last')} {pick(rng, ('&', 'and'))} {others}"
        if kind < 0.75:
            return f"{self.word().capitalize()} {pick(rng, _SHOPS.split())}"
        return f"{self.pick('cities')} {pick(rng, _SHOPS.split())}"

    def street(self) -> str:
        """House number and street."""
        kind = pick(self.rng, ("Street", "Road", "Avenue", "Lane", "St", "Square"))
        return f"{self.rng.integers(1, 200)} {pick(self.rng, (self.pick('last'), self.pick('cities')))} {kind}"

    def phone(self) -> str:
        """A telephone number."""
        a, b, c = (int(v) for v in self.rng.integers((100, 100, 1000), (999, 999, 9999)))
        return pick(
            self.rng, (f"{a}-{b}-{c}", f"({a}) {b}-{c}", f"+{self.rng.integers(1, 99)} {a} {b} {c}", f"0{a} {b}{c}")
        )

    def email(self) -> str:
        """An e-mail address."""
        name = pick(self.rng, (self.pick("first"), f"{self.pick('first')}.{self.pick('last')}", "info", "contact"))
        return f"{name.lower()}@{self.word()}.{pick(self.rng, ('com', 'org', 'net', 'io', 'eu'))}"

    def topic(self) -> str:
        """What a chart or table is about."""
        return pick(self.rng, _TOPICS.split())


class Money:
    """How one document writes amounts: cents with a point or a comma, and where its sign stands."""

    def __init__(self, rng: Generator) -> None:
        self.sign = pick(rng, ("", "", "$", "$", "€", "£", "€"))
        self.after = self.sign == "€" and rng.random() < 0.5
        self.comma = self.sign == "€" and rng.random() < 0.3
        self.grouped = bool(rng.random() < 0.7)

    def bare(self, cents: int) -> str:
        """Without the sign."""
        text = f"{cents / 100:,.2f}" if self.grouped else f"{cents / 100:.2f}"
        return text.translate(str.maketrans(",.", ".,")) if self.comma else text

    def full(self, cents: int) -> str:
        """With the sign, if there is one."""
        return f"{self.bare(cents)} {self.sign}".strip() if self.after else f"{self.sign}{self.bare(cents)}"

    def ways(self, cents: int, shown: str) -> tuple[str, ...]:
        """The amount as it is shown, then the other right ways of writing it."""
        plain = f"{cents / 100:.2f}"
        return tuple(dict.fromkeys((shown, self.full(cents), self.bare(cents), plain, f"{self.sign}{plain}")))
