"""Code with a scope of its own: lambdas, nested functions, comprehensions, generator expressions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import libcst as cst

from nnsight_compiler.frontend.flow import Variable
from nnsight_compiler.frontend.lowering import in_order
from nnsight_compiler.frontend.scopes import Comprehension, Scope
from nnsight_compiler.frontend.strings import Strings
from nnsight_compiler.frontend.targets import target_name
from nnsight_compiler.frontend.trees import comprehension_clauses, parameters_of
from nnsight_compiler.ir.ops import (
    Argument,
    Attribute,
    Build,
    Call,
    Closure,
    Emit,
    Parameter,
    Region,
    Return,
    SetItem,
)
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.values import Operand, Value


class Closures(Strings):
    """Lowers lambdas, the bodies of nested functions, and comprehensions of every kind."""

    def anonymous(self, node: cst.Lambda, hint: str) -> Operand:
        span = self.span(node)

        def body() -> None:
            self.builder.emit(Return(self.expression(node.body), span=self.span(node.body)))

        return self.closure("<lambda>", node, self.defaults(node.params), body, span, hint)

    def defaults(self, parameters: cst.Parameters) -> tuple[Operand, ...]:
        """The defaults of a nested function, evaluated where it is defined."""
        nodes = [each.node.default for each in parameters_of(parameters)]
        return tuple(self.expression(node) for node in nodes if node is not None)

    def closure(
        self,
        name: str,
        node: cst.Lambda | cst.FunctionDef,
        defaults: tuple[Operand, ...],
        body: Callable[[], None],
        span: Span,
        hint: str,
    ) -> Value:
        """A function made here; `body` lowers its code."""
        result = self.fresh(hint)
        declared = list(parameters_of(node.params))
        names = [self.syntax.name(each.node.name.value) for each in declared]
        values = [self.fresh(each) for each in names]
        region = self.nested(self.analysis.scopes[node], dict(zip(names, values, strict=True)), body, span)
        parameters = tuple(
            Parameter(value, each.kind, each.node.default is not None)
            for value, each in zip(values, declared, strict=True)
        )
        self.builder.emit(Closure(result, name, parameters, defaults, region, span=span))
        return result

    def nested(self, scope: Scope, given: dict[str, Value], body: Callable[[], None], span: Span) -> Region:
        """The body of code that runs later. What it does to variables of its own is not seen here."""
        outer, before, start = self.scope, self.environment, len(self.assigned)
        loop, alive = self.loop, self.alive
        self.scope, self.environment, self.loop, self.alive = scope, dict(before), None, True
        with self.builder.region() as ops:
            self.declare(scope, given, span)
            body()
        self.scope, self.environment, self.loop, self.alive = outer, before, loop, alive
        del self.assigned[start:]
        return Region((), tuple(ops))

    # --- comprehensions ---

    def comprehension(self, node: Comprehension, hint: str) -> Operand:
        """Evaluated in place, with an accumulator."""
        span = self.span(node)
        clauses = comprehension_clauses(node.for_in)
        iterable = self.expression(clauses[0].iter)
        accumulator = self.fresh(hint)
        kind = "dict" if isinstance(node, cst.DictComp) else "list" if isinstance(node, cst.ListComp) else "set"
        self.builder.emit(Build(accumulator, kind, (), span=span))  # type: ignore[arg-type]  # a kind
        outer, start = self.scope, len(self.assigned)
        self.scope = scope = self.analysis.scopes[node]
        self.declare(scope, {}, span)

        def innermost() -> None:
            if isinstance(node, cst.DictComp):
                key = self.expression(node.key)
                self.builder.emit(SetItem(accumulator, key, self.expression(node.value), span=span))
                return
            value = self.expression(node.elt)
            method, ignored = self.fresh(), self.fresh()
            name = "append" if isinstance(node, cst.ListComp) else "add"
            self.builder.emit(Attribute(method, accumulator, name, span=span))
            self.builder.emit(Call(ignored, method, (Argument(value),), span=span))

        self.clause(clauses, iterable, in_order(scope.walrus), innermost)
        self.scope = outer
        own = set(scope.own_variables())
        self.assigned[start:] = [variable for variable in self.assigned[start:] if variable not in own]
        return accumulator

    def clause(
        self, clauses: Sequence[cst.CompFor], iterable: Operand, carried: list[Variable], innermost: Callable[[], None]
    ) -> None:
        """One `for` of a comprehension, and what stands to its right."""
        first, rest = clauses[0], clauses[1:]

        def body(item: Value) -> None:
            self.store(first.target, item)
            conditions(first.ifs)

        def conditions(tests: Sequence[cst.CompIf]) -> None:
            if tests:
                test = self.condition(tests[0].test)
                self.choose(test, lambda: conditions(tests[1:]), lambda: None, self.span(tests[0]))
            elif rest:
                self.clause(rest, self.expression(rest[0].iter), carried, innermost)
            else:
                innermost()

        self.iterate(iterable, carried, body, self.span(first.iter), target_name(first.target))

    def generator(self, node: cst.GeneratorExp, hint: str) -> Operand:
        """A closure that is called once, with its first iterable."""
        span = self.span(node)
        clauses = comprehension_clauses(node.for_in)
        iterable = self.expression(clauses[0].iter)
        function, source = self.fresh(), self.fresh("iterable")

        def innermost() -> None:
            self.builder.emit(Emit(self.expression(node.elt), span=self.span(node.elt)))

        region = self.nested(self.analysis.scopes[node], {}, lambda: self.clause(clauses, source, [], innermost), span)
        self.builder.emit(Closure(function, "<genexpr>", (Parameter(source),), (), region, generator=True, span=span))
        result = self.fresh(hint)
        self.builder.emit(Call(result, function, (Argument(iterable),), span=span))
        return result
