"""Statements to ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

import libcst as cst

from nnsight_compiler.frontend.contexts import is_true, kind_of
from nnsight_compiler.frontend.expressions import SIGNS, Expressions
from nnsight_compiler.frontend.lowering import in_order
from nnsight_compiler.frontend.scopes import Suite
from nnsight_compiler.frontend.targets import target_name
from nnsight_compiler.frontend.trees import dotted_name
from nnsight_compiler.ir.ops import (
    Argument,
    Backward,
    Call,
    Forward,
    Global,
    Handler,
    Import,
    Invoke,
    Item,
    Operator,
    Raise,
    Region,
    Return,
    Session,
    SetItem,
    Try,
    While,
    With,
    Yield,
)
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.values import NONE, UNBOUND, Operand, Value


@final
class Statements(Expressions):
    """Lowers statements. What cannot be reached is dropped."""

    def suite(self, suite: Suite) -> None:
        """A block of statements."""
        for statement in suite.body if isinstance(suite, cst.BaseSuite) else suite:
            if self.alive:
                self.statement(statement)

    def statement(self, node: cst.CSTNode) -> None:
        """One statement."""
        _STATEMENTS[type(node)](self, node)

    def line(self, node: cst.SimpleStatementLine) -> None:
        self.suite(node.body)

    def bare_expression(self, node: cst.Expr) -> None:
        self.expression(node.value)

    def nothing(self, node: cst.CSTNode) -> None:
        return

    # --- assignment ---

    def simple_assignment(self, node: cst.Assign) -> None:
        value = self.expression(node.value, target_name(node.targets[0].target))
        for target in node.targets:
            self.store(target.target, value)

    def annotated(self, node: cst.AnnAssign) -> None:
        if node.value is not None:
            self.store(node.target, self.expression(node.value, target_name(node.target)))
        elif isinstance(node.target, cst.Attribute | cst.Subscript):
            self.expression(node.target.value)

    def augmented(self, node: cst.AugAssign) -> None:
        target, sign, span = node.target, SIGNS[type(node.operator)], self.span(node)

        def changed(before: Operand, hint: str = "") -> Operand:
            operands = before, self.expression(node.value)
            result = self.fresh(hint)
            self.builder.emit(Operator(result, sign, operands, in_place=True, span=span))
            return result

        match target:
            case cst.Name():
                name = self.syntax.name(target.value)
                self.assign(name, changed(self.read(name, self.span(target)), target.value), span)
            case cst.Attribute():
                owner, name = self.expression(target.value), self.syntax.name(target.attr.value)
                before = self.load_attribute(owner, name, self.span(target), "")
                self.store_attribute(owner, name, changed(before), span)
            case cst.Subscript():
                owner, index = self.expression(target.value), self.index(target)
                item = self.fresh()
                self.builder.emit(Item(item, owner, index, span=self.span(target)))
                self.builder.emit(SetItem(owner, index, changed(item), span=span))
            case _:
                raise AssertionError(f"Python's parser refuses to augment {type(target).__name__}")

    def delete_statement(self, node: cst.Del) -> None:
        self.delete(node.target)

    # --- imports ---

    def imported(self, node: cst.Import) -> None:
        for alias in node.names:
            module, span = self.syntax.name(dotted_name(alias.name)), self.span(alias)
            renamed = None if alias.asname is None else alias.asname.name
            name = renamed.value if isinstance(renamed, cst.Name) else module.partition(".")[0]
            result = self.fresh(name)
            self.builder.emit(Import(result, module, leaf=renamed is not None, span=span))
            self.assign(self.syntax.name(name), result, span)

    def imported_from(self, node: cst.ImportFrom) -> None:
        assert not isinstance(node.names, cst.ImportStar), "star imports are refused before lowering"
        for alias in node.names:
            span = self.span(alias)
            target = alias.name if alias.asname is None else alias.asname.name
            assert isinstance(target, cst.Name), "what `from` imports is a name"
            result = self.fresh(target.value)
            name, level = dotted_name(alias.name), len(node.relative)
            self.builder.emit(Import(result, dotted_name(node.module), self.syntax.name(name), level, span=span))
            self.assign(self.syntax.name(target.value), result, span)

    # --- paths ---

    def condition_statement(self, node: cst.If) -> None:
        def orelse() -> None:
            if isinstance(node.orelse, cst.If):
                self.condition_statement(node.orelse)
            elif node.orelse is not None:
                self.suite(node.orelse.body)

        merged = in_order(self.analysis.branches[node].merged)
        self.choose(self.condition(node.test), lambda: self.suite(node.body), orelse, self.span(node), merged=merged)

    def asserted(self, node: cst.Assert) -> None:
        span = self.span(node)

        def fail() -> None:
            error = self.fresh("AssertionError")
            self.builder.emit(Global(error, "AssertionError", span=span))
            if node.msg is not None:
                exception = self.fresh()
                message = self.expression(node.msg)
                self.builder.emit(Call(exception, error, (Argument(message),), span=span))
                error = exception
            self.builder.emit(Raise(error, span=span))
            self.alive = False

        self.choose(self.condition(node.test), lambda: None, fail, span)

    def returned(self, node: cst.Return) -> None:
        value = NONE if node.value is None else self.expression(node.value)
        self.builder.emit(Return(value, span=self.span(node)))
        self.alive = False

    def raised(self, node: cst.Raise) -> None:
        exception = None if node.exc is None else self.expression(node.exc)
        cause = None if node.cause is None else self.expression(node.cause.item)
        self.builder.emit(Raise(exception, cause, span=self.span(node)))
        self.alive = False

    # --- loops ---

    def for_loop(self, node: cst.For) -> None:
        iterable = self.expression(node.iter)

        def body(item: Value) -> None:
            self.store(node.target, item)
            self.suite(node.body)

        carried = in_order(self.analysis.loops[node].carried)
        self.iterate(iterable, carried, body, self.span(node), target_name(node.target), self.loop_else(node))

    def while_loop(self, node: cst.While) -> None:
        span = self.span(node)
        carried = in_order(self.analysis.loops[node].carried)
        before, start = self.environment, len(self.assigned)
        initial = self.held(carried)
        unsure = {each for each, value in zip(carried, initial, strict=True) if self.is_unsure(value) or each.deleted}
        self.environment = dict(before)
        tested = [self.merge_value(each, each in unsure) for each in carried]
        with self.builder.region() as ops:
            condition = self.condition(node.test)
            held = self.held(carried)
            self.builder.emit(Yield((condition, *held), span=span))
        test = Region(tuple(tested), tuple(ops))
        unsure = {each for each, value in zip(carried, held, strict=True) if self.is_unsure(value)}
        self.environment = dict(before)
        parameters = [self.merge_value(each, each in unsure) for each in carried]
        inner, frame = self.loop_body(carried, lambda: self.suite(node.body), span)
        body = Region(tuple(parameters), inner)
        endless = is_true(node.test)
        frame.unsure = set() if endless else unsure
        orelse = self.loop_exit(frame, before, None if endless else self.loop_else(node), span)
        results = self.loop_results(frame, before, start)
        self.builder.emit(While(results, initial, test, body, orelse, span=span))

    def loop_else(self, node: cst.For | cst.While) -> Callable[[], None] | None:
        orelse = node.orelse
        return None if orelse is None else lambda: self.suite(orelse.body)

    def jump_statement(self, node: cst.Break | cst.Continue) -> None:
        self.jump("break" if isinstance(node, cst.Break) else "continue", self.span(node))

    # --- exceptions and contexts ---

    def attempt(self, node: cst.Try) -> None:
        before = self.environment
        body, reached = self.guarded(lambda: self.suite(node.body))
        orelse = finalizer = None
        if node.orelse is not None and reached:
            other = node.orelse
            orelse, reached = self.guarded(lambda: self.suite(other.body))
        handlers = []
        for each in node.handlers:
            handler, handled = self.handler(each)
            handlers.append(handler)
            reached = reached or handled
        if node.finalbody is not None:
            final = node.finalbody
            finalizer, finished = self.guarded(lambda: self.suite(final.body))
            reached = reached and finished
        self.environment, self.alive = before, reached
        self.builder.emit(Try(body, tuple(handlers), orelse, finalizer, span=self.span(node)))

    def guarded(self, lower: Callable[[], None]) -> tuple[Region, bool]:
        """A section that an exception may end, and whether its end can be reached. What it assigns and others use is in
        cells, so that the rest can be forgotten."""
        before, self.environment, self.alive = self.environment, dict(self.environment), True
        with self.builder.region() as ops:
            lower()
        self.environment = before
        reached, self.alive = self.alive, True
        return Region((), tuple(ops)), reached

    def handler(self, node: cst.ExceptHandler) -> tuple[Handler, bool]:
        span = self.span(node)
        types = None
        if node.type is not None:
            caught = node.type
            types, _ = self.guarded(
                lambda: self.builder.emit(Yield((self.expression(caught),), span=self.span(caught))) and None
            )
        name = "" if node.name is None or not isinstance(node.name.name, cst.Name) else node.name.name.value
        exception = self.fresh(name or "exception")

        def body() -> None:
            if name:
                self.assign(self.syntax.name(name), exception, span)
            self.suite(node.body)
            if name and self.alive:
                self.assign(self.syntax.name(name), UNBOUND, span)

        region, reached = self.guarded(body)
        return Handler(types, Region((exception,), region.ops)), reached

    def with_statement(self, node: cst.With) -> None:
        self.with_items(node.items, node.body, self.span(node))

    def with_items(self, items: Sequence[cst.WithItem], body: Suite, span: Span) -> None:
        """The items of a `with`, each inside the one before, and its body inside them all."""
        if not items:
            self.suite(body)
            return
        item, rest = items[0], items[1:]
        kind = kind_of(item)
        if kind in ("torch", "unknown"):
            self.context(item, rest, body, span, transparent=kind == "torch")
            return
        call = item.item
        assert isinstance(call, cst.Call), "kind_of has looked"
        assert isinstance(call.func, cst.Attribute), "kind_of has looked"
        owner = self.expression(call.func.value)
        arguments = self.arguments(call.args)
        self.model_context(kind, owner, arguments, item, rest, body, span)

    def model_context(
        self,
        kind: str,
        owner: Operand,
        arguments: tuple[Argument, ...],
        item: cst.WithItem,
        rest: Sequence[cst.WithItem],
        body: Suite,
        span: Span,
    ) -> None:
        """A forward, a session, an invoke or a backward pass, whose model and arguments are evaluated already."""
        target = None if item.asname is None else item.asname.name
        result = self.fresh(_hint(target)) if kind != "backward" else None
        outer = self.in_forward, self.in_session, self.in_backward
        self.in_forward = self.in_forward or kind not in ("session", "backward")
        self.in_session = self.in_session or kind == "session"
        self.in_backward = self.in_backward or kind == "backward"
        with self.builder.region() as ops:
            if target is not None and result is not None:
                self.store(target, result)
            self.with_items(rest, body, span)
        self.in_forward, self.in_session, self.in_backward = outer
        region = Region((), tuple(ops))
        match kind, result:
            case "trace" | "generate" | "scan", Value():
                self.builder.emit(Forward(result, owner, kind, arguments, region, span=span))
            case "session", Value():
                self.builder.emit(Session(result, owner, arguments, region, span=span))
            case "invoke", Value():
                self.builder.emit(Invoke(result, owner, arguments, region, span=span))
            case _:
                self.builder.emit(Backward(owner, arguments, region, span=span))

    def context(
        self, item: cst.WithItem, rest: Sequence[cst.WithItem], body: Suite, span: Span, transparent: bool
    ) -> None:
        """Any other context manager. One that is not torch's own may swallow exceptions: then what its body assigned
        is in cells, and its end is always reached."""
        context = self.expression(item.item)
        before = self.environment
        target = None if item.asname is None else item.asname.name
        result = self.fresh(_hint(target))
        if not transparent:
            self.environment = dict(before)
        with self.builder.region() as ops:
            if target is not None:
                self.store(target, result)
            self.with_items(rest, body, span)
        if not transparent:
            self.environment, self.alive = before, True
        self.builder.emit(With(result, context, Region((), tuple(ops)), span=span))

    # --- nested functions ---

    def function(self, node: cst.FunctionDef) -> None:
        decorators = [self.expression(each.decorator) for each in node.decorators]
        defaults = self.defaults(node.params)
        name, span = self.syntax.name(node.name.value), self.span(node.name)
        value = self.closure(node.name.value, node, defaults, lambda: self.suite(node.body), span, name)
        for decorator in reversed(decorators):
            result = self.fresh(name)
            self.builder.emit(Call(result, decorator, (Argument(value),), span=span))
            value = result
        self.assign(name, value, span)


def _hint(target: cst.BaseExpression | None) -> str:
    return "" if target is None else target_name(target)


_Handler = Callable[[Statements, cst.CSTNode], None]


def _handlers(*pairs: tuple[type[cst.CSTNode], object]) -> dict[type[cst.CSTNode], _Handler]:
    return dict(pairs)  # type: ignore[arg-type]  # each handler takes the node class that it is listed for


_STATEMENTS = _handlers(
    (cst.SimpleStatementLine, Statements.line),
    (cst.Expr, Statements.bare_expression),
    (cst.Assign, Statements.simple_assignment),
    (cst.AnnAssign, Statements.annotated),
    (cst.AugAssign, Statements.augmented),
    (cst.Del, Statements.delete_statement),
    (cst.Import, Statements.imported),
    (cst.ImportFrom, Statements.imported_from),
    (cst.Global, Statements.nothing),
    (cst.Nonlocal, Statements.nothing),
    (cst.Pass, Statements.nothing),
    (cst.If, Statements.condition_statement),
    (cst.Assert, Statements.asserted),
    (cst.Return, Statements.returned),
    (cst.Raise, Statements.raised),
    (cst.For, Statements.for_loop),
    (cst.While, Statements.while_loop),
    (cst.Break, Statements.jump_statement),
    (cst.Continue, Statements.jump_statement),
    (cst.Try, Statements.attempt),
    (cst.With, Statements.with_statement),
    (cst.FunctionDef, Statements.function),
)
