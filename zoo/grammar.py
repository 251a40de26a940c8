"""The grammar of expressions over rewards, as "clip - 0.1*jpeg_size": Python's own, cut down."""

import ast
import re

from support.errors import UserError

# a function in a file; quotes are needed where the path has spaces
FILE = re.compile(r'(?:"[^"]+\.py"|[\w./~][\w./~-]*\.py):\w+')
# the terms that are not Python: an address, a function in a file, a name with options
TERM = re.compile(rf'https?://[^\s*()]+|{FILE.pattern}|[A-Za-z]\w*(?::(?:"[^"]*"|[\w./-]+))+')
# the parts of a term between its colons, of which there may be some in quotes
OPTION = re.compile(r'"[^"]*"|[^:]+')


class Formula:
    """An expression that was parsed: called with the values of its terms, it returns its value.

    `names` lists its terms in their order. UserError if it does not parse.
    """

    def __init__(self, expression):
        self.expression = expression
        try:
            self.tree = parse(expression)
            self.names = names_in(self.tree)
            self(dict.fromkeys(self.names, 0.0))  # finds what may not stand in an expression
        except SyntaxError as error:
            column = error.offset or len(expression) + 1
            raise UserError(f"reward {expression!r} does not parse at column {column}") from error
        except (RecursionError, MemoryError) as error:
            raise UserError(f"reward {expression[:40]!r}... is nested too deeply") from error

    def __call__(self, values):
        """Return the value for {name: value of that term}, tensors or numbers."""
        return self.evaluate(self.tree, values)

    def evaluate(self, node, values):
        """Return the value of one node of the tree."""
        match node:
            case ast.BinOp(left, ast.Add(), right):
                return self.evaluate(left, values) + self.evaluate(right, values)
            case ast.BinOp(left, ast.Sub(), right):
                return self.evaluate(left, values) - self.evaluate(right, values)
            case ast.BinOp(left, ast.Mult(), right):
                return self.evaluate(left, values) * self.evaluate(right, values)
            case ast.UnaryOp(ast.USub(), operand):
                return -self.evaluate(operand, values)
            case ast.Name(name):
                return values[name]
            case ast.Constant(number) if type(number) in (int, float):
                return float(number)

        place = f"column {node.col_offset + 1} of reward {self.expression!r}"
        raise UserError(f"{place}: only names, numbers, + - * and parentheses may stand here")


def parse(expression):
    """Return the syntax tree of an expression, whose names are its terms."""
    # Python sees a placeholder of the same length for each term, so that columns stay right
    text = TERM.sub(lambda match: "x" * len(match[0]), expression)
    text = re.sub(r"\s", " ", text)  # a line break ends nothing
    tree = ast.parse(text, mode="eval").body

    terms = {match.start(): match[0] for match in TERM.finditer(expression)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            node.id = terms.get(node.col_offset, node.id)
    return tree


def split_expressions(text):
    """Return the expressions in a text, which commas separate, but for those in quotes."""
    return re.findall(r'(?:[^,"]|"[^"]*"?)+', text)


def names_in(tree):
    """Return the names in a tree, each once, from left to right."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    nodes.sort(key=lambda node: node.col_offset)
    return list(dict.fromkeys(node.id for node in nodes))
