"""Classes and functions as their source describes them, without importing it: to import torch takes seconds.

What is read of a class is its docstring, its class attributes, the fields of a dataclass with their types and defaults,
and which of its methods are hooks. Of a function it is the docstring and the signature. Only what the text itself says
is used: literals, names of the standard library, and what other modules say in the same way. Anything else raises
`Unreadable`, and the caller imports the class instead.
"""
from __future__ import annotations

import ast
import builtins
import dataclasses
import sys
import types
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import find_spec
from inspect import Parameter, Signature, cleandoc
from pathlib import Path
from typing import Any

from loopctl.composition.compose import SPECS
from loopctl.composition.options import Option
from loopctl.hooks import hookimpl

# What the text of an expression may consist of, and what it may call.
NODES = (ast.Constant, ast.Name, ast.Load, ast.Attribute, ast.Subscript, ast.Tuple, ast.List, ast.Dict, ast.Set,
         ast.BinOp, ast.operator, ast.UnaryOp, ast.unaryop, ast.Call, ast.keyword, ast.Lambda, ast.arguments)
CALLS = (dataclasses.dataclass, dataclasses.field, hookimpl, Option, Path, bool, int, float, str, list, tuple, dict,
         set, frozenset)
Definition = ast.ClassDef | ast.FunctionDef


class Unreadable(Exception):
    """What is asked for is not said by the source in a form that can be read without running it."""


def source_file(module: str) -> Path | None:
    """The source file of a module, or None. Neither the module nor its parent packages are imported."""
    path: list[str] | None = None
    parts = module.split(".")
    for count in range(1, len(parts) + 1):
        name = ".".join(parts[:count])
        if name in sys.modules:
            imported = sys.modules[name]
            if count == len(parts):
                return Path(imported.__file__) if imported.__file__ else None
            path = list(getattr(imported, "__path__", []))
            continue
        # For a top-level package, find_spec tries all finders: `pip install -e` may have installed one of its own.
        spec = find_spec(name) if path is None else PathFinder.find_spec(name, path)
        if spec is None or spec.origin is None:
            return None
        path = list(spec.submodule_search_locations or [])
        if count == len(parts):
            return Path(spec.origin)
    return None


class SourceReader:
    """Reads modules, each file once."""

    def __init__(self) -> None:
        self.trees: dict[str, ast.Module] = {}

    def tree(self, module: str) -> ast.Module:
        """The syntax tree of a module, or of a file whose path is given in place of a module."""
        if module not in self.trees:
            try:
                file = Path(module) if module.endswith(".py") else source_file(module)
                if file is None or file.suffix != ".py":
                    raise Unreadable(f"{module} has no source")
                self.trees[module] = ast.parse(file.read_bytes())
            except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
                raise Unreadable(f"{module}: {error}") from error
        return self.trees[module]

    def statement(self, module: str, name: str) -> ast.stmt:
        """The only statement at the top of a module that binds `name`. `loopctl` itself says it for type checkers."""
        body = self.tree(module).body
        if module == "loopctl":
            body = [*body, *(inner for outer in body if isinstance(outer, ast.If) for inner in outer.body)]
        found = [statement for statement in body if name in bound_names(statement) and not is_for_types(statement)]
        if len(found) != 1:
            raise Unreadable(f"{module} binds {name} {len(found)} times")
        return found[0]

    def definition(self, module: str, name: str) -> tuple[str, Definition]:
        """The class or function that `name` is in a module, and the module that defines it."""
        statement = self.statement(module, name)
        if isinstance(statement, ast.ImportFrom):
            return self.definition(origin_module(module, statement), original_name(statement, name))
        if not isinstance(statement, Definition):
            raise Unreadable(f"{module}: {name} is neither a class nor a function")
        return module, statement

    def attribute(self, module: str, name: str, attribute: str) -> str:
        """The text that a class, or the first of its bases that has it, gives a class attribute; empty if none does."""
        module, node = self.definition(module, name)
        for statement in node.body:
            if attribute in bound_names(statement) and isinstance(statement, ast.Assign | ast.AnnAssign):
                is_option = isinstance(statement, ast.AnnAssign) and "ClassVar" not in ast.unparse(statement.annotation)
                value = statement.value
                return str(value.value) if isinstance(value, ast.Constant) and not is_option else ""
        bases = node.bases if isinstance(node, ast.ClassDef) else []
        for base in bases:
            if isinstance(base, ast.Name) and (found := self.attribute(module, base.id, attribute)):
                return found
        return ""

    def value(self, module: str, name: str) -> Any:
        """What `name` is in a module: a class is made anew by `class_of`, unless its module is imported already."""
        if module in sys.modules and name in vars(sys.modules[module]):
            return vars(sys.modules[module])[name]
        if module.split(".")[0] in sys.stdlib_module_names:
            return getattr(import_module(module), name)
        statement = self.statement(module, name)
        if isinstance(statement, ast.ImportFrom):
            return self.value(origin_module(module, statement), original_name(statement, name))
        if isinstance(statement, ast.Import):
            (full,) = [alias.name for alias in statement.names if bound_name(alias) == name]
            if full.split(".")[0] in sys.stdlib_module_names:
                return import_module(full if name != full.split(".")[0] else name)
        if isinstance(statement, ast.ClassDef):
            return self.class_of(module, name)
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value:
            return self.evaluate(module, statement.value)
        raise Unreadable(f"{module}: the value of {name} is not in its text")

    def evaluate(self, module: str, expression: ast.expr) -> Any:
        """The value of an expression at the top of a module, or in one of its classes."""
        names: dict[str, Any] = {}
        for node in ast.walk(expression):
            private = isinstance(node, ast.Attribute) and node.attr.startswith("_")
            if private or not isinstance(node, NODES):
                raise Unreadable(f"{module}: {ast.unparse(expression)} is not plain")
            if isinstance(node, ast.Name) and node.id not in names:
                names[node.id] = self.value("builtins" if hasattr(builtins, node.id) else module, node.id)
        for node in ast.walk(expression):
            if isinstance(node, ast.Call) and self.evaluate(module, node.func) not in CALLS:
                raise Unreadable(f"{module}: {ast.unparse(node.func)} is not called")
        try:
            return eval(compile(ast.Expression(expression), module, "eval"), {"__builtins__": {}, **names})
        except Exception as error:
            raise Unreadable(f"{module}: {ast.unparse(expression)}: {error}") from error

    def class_of(self, module: str, name: str) -> type:
        """A class with the fields, attributes and hooks of the class `name`. Its methods do nothing."""
        self.check_module(module)
        node = self.statement(module, name)
        if not isinstance(node, ast.ClassDef) or node.keywords:
            raise Unreadable(f"{module}: {name} is not a plain class")
        scope: dict[str, Any] = {"__module__": module, "__doc__": ast.get_docstring(node, clean=False),
                                 "__annotations__": {}}
        for statement in node.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                scope["__annotations__"][statement.target.id] = self.annotation(module, node, statement.annotation)
                if statement.value:
                    scope[statement.target.id] = self.evaluate(module, statement.value)
            elif isinstance(statement, ast.Assign) and all(isinstance(to, ast.Name) for to in statement.targets):
                scope |= dict.fromkeys(bound_names(statement), self.evaluate(module, statement.value))
            elif isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
                if statement.name in SPECS or not statement.name.startswith("__"):
                    scope[statement.name] = self.method(module, statement)
            elif not isinstance(statement, ast.Pass | ast.ClassDef) and not is_text(statement):
                raise Unreadable(f"{module}: {name} has a line that is not plain: {ast.unparse(statement)}")
        bases = tuple(self.evaluate(module, base) for base in node.bases)
        try:
            cls: Any = types.new_class(name, bases, {}, lambda own: own.update(scope))
            for decorator in reversed(node.decorator_list):
                cls = self.decorator(module, decorator, dataclasses.dataclass)(cls)
        except Unreadable:
            raise
        except Exception as error:                   # such as a list as a default: importing it reports that
            raise Unreadable(f"{module}: {name}: {error}") from error
        if not isinstance(cls, type):
            raise Unreadable(f"{module}: {name} is not a class")
        return cls

    def annotation(self, module: str, owner: ast.ClassDef, annotation: ast.expr) -> Any:
        """The type of a field. A class that is not a dataclass has none, so what it names there may be anything."""
        if owner.decorator_list:
            return self.evaluate(module, annotation)
        for node in ast.walk(annotation):
            if isinstance(node, ast.Name) and not hasattr(builtins, node.id):
                self.statement(module, node.id)
        return Any

    def method(self, module: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> Callable[..., Any]:
        """A function in place of a method; if that is a hook, it is marked as one."""
        def method(*args: Any, **kwargs: Any) -> None: ...
        for decorator in reversed(node.decorator_list) if node.name in SPECS else ():
            method = self.decorator(module, decorator, hookimpl)(method)
        return method

    def decorator(self, module: str, expression: ast.expr, allowed: Any) -> Any:
        """The value of a decorator: `allowed`, or what it returns. Raises Unreadable for any other."""
        name = expression.func if isinstance(expression, ast.Call) else expression
        if self.evaluate(module, name) is not allowed:
            raise Unreadable(f"{module}: the decorator {ast.unparse(name)} is not applied")
        return self.evaluate(module, expression)

    def check_module(self, module: str) -> None:
        """Raise Unreadable where a module has lines that may change a class, or imports a package that is missing."""
        for statement in self.tree(module).body:
            if not is_plain(statement):
                raise Unreadable(f"{module} has a line that is not plain: {ast.unparse(statement)}")
            for name in imported_modules(statement):
                package = name.split(".")[0]
                if package not in sys.modules and find_spec(package) is None:
                    raise Unreadable(f"{module} imports {package}, which is not installed")

    def signature(self, module: str, name: str) -> tuple[Signature, str]:
        """The signature and the docstring of a function, or of a class, whose first argument is left out.

        The annotations of the signature are text.
        """
        module, node = self.definition(module, name)
        text = ast.get_docstring(node) or self.docstring_after(module, name)
        skipped = 0
        if isinstance(node, ast.ClassDef):
            found = [inner for inner in node.body if isinstance(inner, ast.FunctionDef) and inner.name == "__init__"]
            if not found:
                raise Unreadable(f"{module}: {name} has no __init__")
            node, skipped = found[0], 1
        of = node.args
        plain = [*of.posonlyargs, *of.args]
        defaults: list[ast.expr | None] = [*[None] * (len(plain) - len(of.defaults)), *of.defaults]
        parameters = []
        pairs = zip([*plain, *of.kwonlyargs], [*defaults, *of.kw_defaults], strict=True)
        for index, (argument, default) in enumerate(pairs):
            parameters.append(Parameter(
                argument.arg, Parameter.POSITIONAL_OR_KEYWORD if index < len(plain) else Parameter.KEYWORD_ONLY,
                default=self.evaluate(module, default) if default else Parameter.empty,
                annotation=ast.unparse(argument.annotation) if argument.annotation else Parameter.empty))
        del parameters[:skipped]
        if of.kwarg:
            parameters.append(Parameter(of.kwarg.arg, Parameter.VAR_KEYWORD))
        return Signature(parameters), text


    def docstring_after(self, module: str, name: str) -> str:
        """The docstring that a module gives a class after its definition, as torch's optimizers have it, or empty."""
        for statement in self.tree(module).body:
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == f"{name}.__doc__":
                return cleandoc(self.text(module, statement.value))
        return ""

    def text(self, module: str, node: ast.expr) -> str:
        """The text of literals that are joined, and of names of such; what is neither is left out."""
        if isinstance(node, ast.BinOp):
            return self.text(module, node.left) + self.text(module, node.right)
        if isinstance(node, ast.JoinedStr):
            return "".join(self.text(module, part) for part in node.values)
        if isinstance(node, ast.FormattedValue):
            return self.text(module, node.value)
        try:
            return str(self.evaluate(module, node))
        except Unreadable:
            return ""


def is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def is_plain(statement: ast.stmt) -> bool:
    """Whether a statement only imports and binds names, so that it cannot change a class defined elsewhere."""
    if isinstance(statement, ast.If | ast.Try):
        handlers = statement.handlers if isinstance(statement, ast.Try) else []
        final = statement.finalbody if isinstance(statement, ast.Try) else []
        inner = [*statement.body, *(line for part in handlers for line in part.body), *statement.orelse, *final]
        return all(is_plain(line) for line in inner)
    binds = isinstance(statement, ast.Assign | ast.AnnAssign) and bool(bound_names(statement))
    return binds or is_text(statement) or isinstance(statement, ast.Import | ast.ImportFrom | ast.Pass | Definition)


def is_for_types(statement: ast.stmt) -> bool:
    """Whether a statement is `if TYPE_CHECKING:`."""
    if not isinstance(statement, ast.If) or statement.orelse:
        return False
    return ast.unparse(statement.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def bound_name(alias: ast.alias) -> str:
    return alias.asname or alias.name.split(".")[0]


def bound_names(statement: ast.stmt) -> set[str]:
    """The names that a statement binds in the scope that it is in; none for one that changes something else."""
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return {bound_name(alias) for alias in statement.names}
    if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return {statement.name}
    if isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        names = {target.id for target in targets if isinstance(target, ast.Name)}
        return names if len(names) == len(targets) else set()
    inner = [node for node in ast.walk(statement) if isinstance(node, ast.Import | ast.ImportFrom | Definition)]
    stored = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return stored.union(*map(bound_names, inner))


def imported_modules(statement: ast.stmt) -> list[str]:
    """The modules of other packages that an import names."""
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names]
    if isinstance(statement, ast.ImportFrom) and not statement.level:
        return [statement.module or ""]
    return []


def origin_module(module: str, statement: ast.ImportFrom) -> str:
    """The module that a `from ... import` in `module` names."""
    if not statement.level:
        return statement.module or ""
    file = source_file(module)
    parts = module.split(".")
    kept = parts[:len(parts) - statement.level + (file is not None and file.name == "__init__.py")]
    return ".".join([*kept, *([statement.module] if statement.module else [])])


def original_name(statement: ast.ImportFrom, name: str) -> str:
    return next(alias.name for alias in statement.names if bound_name(alias) == name)
