"""Which calls of a program a file may make: those of the closed set, of its own functions, and of what it is given.

    %0 = global numpy                               numpy.linalg.norm is not in the table of known calls:
    %1 = attr %0.linalg                      ──▶    a host call, with its line
    %2 = attr %1.norm
    %3 = call %2(%h)

Each value is followed as far as one look at each op tells: to a name of the closed set, a function or a module of the
file, what the caller gave, or an attribute of something that only the run can give. A call of such an attribute is
admitted by its name, as a known method. A call of a value that came through a container or another function is
admitted only if no attribute whose name is not known gets anywhere but into its own call: then there is nothing in
containers but functions of these kinds.

Before a model is known (`deferred`), what is reached from the parameters may be modules of the model, and is left for
the look at the specialised program.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from typing import Any, final

from torch import nn

from nnsight_compiler.files.kinds import (
    ANYTHING,
    BARE_METHODS,
    COMPUTED,
    FORMATTING,
    GIVEN,
    HANDED_ON,
    KEEPING,
    PLAIN,
    PRINTING,
    TEXT_METHODS,
    THROUGH,
    TREE_METHODS,
    Anything,
    Computed,
    Environment,
    Given,
    HostOp,
    Instances,
    Kind,
    Own,
    Part,
    Tree,
    is_known_method,
    kind_of,
    looks_at_values,
    trains,
)
from nnsight_compiler.files.vocabulary import (
    IN_SIGHT,
    NAMESPACES,
    Constant,
    HostName,
    KnownName,
    Named,
    Space,
    allowed_attribute,
    member,
    part,
)
from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import Op
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.traverse import operands, walk
from nnsight_compiler.ir.values import Literal, Module, Operand, Value, values_in
from nnsight_compiler.passes.known_calls import ALL, MODULE_CALL, known_target
from nnsight_compiler.passes.sites import ATTENTION_VALUES
from nnsight_compiler.passes.streams import STREAM

SITES = frozenset({"output", "input", "inputs"})
"""Sites of what may be a module, in a helper that is given it."""
VALUES = frozenset((*ATTENTION_VALUES, *STREAM))
"""Attributes of modules that are sites, as `.output` is; a program has them as attributes until the model is known."""


@final
@dataclass(slots=True)
class Findings:
    """What a look at one program found.

    hosts: host calls. host_ops: the op that each of them is. dynamic: calls of a value that only the run can give.
    loose: attributes that get elsewhere than into their own call. reached: programs of the functions that it mentions.
    """

    hosts: list[HostOp] = field(default_factory=list)
    host_ops: list[Op] = field(default_factory=list)
    dynamic: list[Span] = field(default_factory=list)
    loose: list[Span] = field(default_factory=list)
    reached: list[Program] = field(default_factory=list)


def admitted(findings: list[Findings]) -> list[HostOp]:
    """The host calls of programs that run together, in the order of their lines."""
    found = [call for each in findings for call in each.hosts]
    if any(each.loose for each in findings):
        found += [HostOp("a function that only the run can give", span) for each in findings for span in each.dynamic]
    return sorted(dict.fromkeys(found), key=lambda call: (call.span.file, call.span.line, call.span.column, call.name))


def look(
    program: Program,
    environment: Environment,
    deferred: bool,
    methods: Set[str],
    given: Kind | None = None,
    receiver: Kind | None = None,
) -> Findings:
    """What calls a program makes.

    Args:
        deferred: no model is known yet, so that a call of an attribute of what was given may be one of a module.
        methods: the names of all methods of captured classes, which no program may assign.
        given: what its parameters may be: what the caller of the experiment gave, where nothing else is said.
        receiver: for a method, what its first parameter is.
    """
    return _Look(program, environment, deferred, methods, given or GIVEN, receiver).run()


class _Look:
    def __init__(
        self,
        program: Program,
        environment: Environment,
        deferred: bool,
        methods: Set[str],
        given: Kind,
        receiver: Kind | None,
    ) -> None:
        self.program = program
        self.environment = environment
        self.deferred = deferred
        self.methods = methods
        self.kinds: dict[str, Kind] = {}
        self.found = Findings()
        self.current: Op
        self.stored = {
            op.cell.name for op in program.walk() if isinstance(op, ops.Store) and isinstance(op.cell, Value)
        }
        for number, parameter in enumerate(program.parameters):
            self.kinds[parameter.value.name] = given if number or receiver is None else receiver
        self.owners = {op.result.name: op.object for op in program.walk() if isinstance(op, ops.Attribute)}

    def run(self) -> Findings:
        edits = (each for each in walk(self.program.body) if isinstance(each, ops.Applied))
        of_model = {id(op) for edit in edits for op in walk(edit.body)}  # those are the model's, and no part of a file
        for op in walk(self.program.body):
            if id(op) not in of_model:
                self.op(op)
        return self.found

    def kind(self, operand: Operand) -> Kind:
        match operand:
            case Value(name=name):
                return self.kinds.get(name, ANYTHING)
            case Module():
                return GIVEN
            case Literal():
                return COMPUTED
            case _:
                return ANYTHING

    def op(self, op: Op) -> None:
        self.current = op
        self.escapes(op)
        match op:
            case ops.Global(result=result, name=name, scope=scope):
                self.kinds[result.name] = self.environment(name, scope)
            case ops.Import(result=result):
                self.kinds[result.name] = self.imported(op)
            case ops.Attribute(result=result, object=owner, name=name):
                self.kinds[result.name] = self.attribute(self.kind(owner), name)
            case ops.Item(result=result, object=owner):
                self.kinds[result.name] = self.item(self.kind(owner))
            case ops.Unpack(results=results, value=value):
                self.kinds.update((result.name, self.item(self.kind(value))) for result in results)
            case ops.Bound(result=result, value=value):
                self.kinds[result.name] = self.kind(value)
            case ops.Cell(result=result, initial=initial):
                self.kinds[result.name] = ANYTHING if result.name in self.stored else self.kind(initial)
            case ops.Load(result=result, cell=cell):
                self.kinds[result.name] = self.kind(cell)
            case ops.Edit(results=(_, edited), model=model):
                self.kinds[edited.name] = self.kind(model)
            case ops.Closure(result=result):
                self.kinds[result.name] = Own()
            case ops.For(iterable=iterable, body=body):
                self.kinds[body.parameters[0].name] = self.item(self.kind(iterable))
            case ops.Read(result=result) | ops.Grad(result=result) | ops.Format(result=result):
                self.kinds[result.name] = COMPUTED
            case ops.Operator(result=result, operands=parts):
                computed = any(self.kind(operand) == COMPUTED for operand in parts)
                self.kinds[result.name] = COMPUTED if computed else ANYTHING
            case ops.Call():
                self.kinds[op.result.name] = self.call(op)
            case ops.Forward(arguments=arguments) if any(a.star or a.keyword in HANDED_ON for a in arguments):
                self.found.dynamic.append(op.span)
            case ops.SetAttribute(object=owner, name=name) | ops.Delete(object=owner, name=str() as name):
                self.assigns(owner, name, op.span)
                stored = self.kind(op.value) if isinstance(op, ops.SetAttribute) else ANYTHING
                if isinstance(stored, Part) and self.is_loose(stored):
                    self.host(f"`.{stored.name}`, kept as an attribute", op.span)
            case ops.SetItem(object=owner) | ops.Delete(object=owner):
                self.changes(owner, "[…]", op.span)

    # --- where values go ---

    def escapes(self, op: Op) -> None:
        """Notes values that get elsewhere than into an attribute, an item, a call of theirs, or a number."""
        for operand in _escaping(op):
            for value in values_in(operand):
                match self.kind(value):
                    case Space(name=name) | HostName(name=name):
                        self.host(f"{name} as a value", op.span)
                    case KnownName(target=target) if target in IN_SIGHT and not self.is_asked_for(op):
                        self.host(f"{target.partition('.')[2]} as a value", op.span)
                    case Own(program=Program() as program):
                        self.found.reached.append(program)
                    case Part() as taken if self.is_loose(taken):
                        self.found.loose.append(op.span)

    def is_asked_for(self, op: Op) -> bool:
        """Whether an op only asks whether a value is of a class."""
        classes = KnownName("builtins.isinstance"), KnownName("builtins.issubclass")
        return isinstance(op, ops.Call) and self.kind(op.function) in classes

    def is_loose(self, found: Part) -> bool:
        """Whether an attribute may be a method of which nothing is known."""
        if self.deferred and found.root != COMPUTED:
            return False
        return not is_known_method(found.name) and found.name not in PLAIN | TEXT_METHODS

    def assigns(self, owner: Operand, name: str, span: Span) -> None:
        """An attribute is set or deleted."""
        if name in self.methods or hasattr(nn.Module, name):
            self.host(f"`.{name}`, a method that is replaced", span)
        if name not in VALUES:
            self.changes(owner, f".{name}", span)

    def changes(self, owner: Operand, what: str, span: Span) -> None:
        match self.kind(owner):
            case Part(name=name) if name.removesuffix("[…]") in VALUES:
                pass  # a site, once the model is known
            case Space(name=name) | HostName(name=name) | KnownName(target=name):
                self.host(f"{name}{what}, which is changed", span)
            case Part(name=name, root=Given()) if self.deferred and name.removesuffix("[…]") in SITES:
                pass  # of a module, if it is one, which the look at the specialised program tells
            case Given() if not self.deferred:
                self.host(f"`{what}` of what the caller gave, which is changed", span)
            case Part(name=name, root=Given()):
                self.host(f"`.{name}{what}` of what the caller gave, which is changed", span)
            case _ if isinstance(owner, Module):
                self.host(f"`{what}` of a module of the model, which is changed", span)
            case Tree() | Instances():
                pass  # the file's own
            case kind if what.startswith(".") and what[1:] not in KEEPING | SITES:
                if not self.deferred or kind == COMPUTED or (isinstance(kind, Part) and kind.root == COMPUTED):
                    self.host(f"`{what}` of what only the run can give, which is changed", span)

    def host(self, name: str, span: Span) -> None:
        self.found.hosts.append(HostOp(name, span))
        self.found.host_ops.append(self.current)

    # --- what values are ---

    def imported(self, op: ops.Import) -> Kind:
        if op.level:
            self.host(f"the import from `{'.' * op.level}{op.module}`", op.span)
            return ANYTHING
        whole = op.module if op.leaf or op.name else op.module.partition(".")[0]
        found: Named = Space(whole) if {op.module, whole} <= NAMESPACES else HostName(whole)
        if op.name is not None:
            found = member(found, op.name) if isinstance(found, Space) else HostName(f"{whole}.{op.name}")
        if isinstance(found, HostName):
            self.host(f"the import of {found.name}", op.span)
        return found

    def attribute(self, owner: Kind, name: str) -> Kind:
        match owner:
            case Space():
                return member(owner, name)
            case HostName(name=whole):
                return HostName(f"{whole}.{name}")
            case KnownName(target=target):
                found = part(target, name)
                # `dict.fromkeys`, `str.upper`: a method that is known by its name.
                return Part(name) if isinstance(found, HostName) and is_known_method(name) else found
            case Tree(modules=modules):
                return self.of_modules(modules, name)
            case Instances(kind=kind, held=objects):
                return self.of_instances(kind, objects, name)
            case Given() | Computed():
                return Part(name, owner)
            case Part(root=root):
                return Part(name, root)
            case _:
                return Part(name)

    @staticmethod
    def of_modules(modules: tuple[nn.Module, ...], name: str) -> Kind:
        """An attribute of one of these modules, or of those inside them."""
        inside = {id(module): module for outer in modules for module in outer.modules()}
        held: list[Any] = []
        for module in inside.values():
            if name in module._modules:
                held.append(module._modules[name])
            elif name in vars(module) or name in module._parameters or name in module._buffers:
                held.append(None)
            elif getattr(type(module), name, None) is not getattr(nn.Module, name, None):
                held.append(getattr(type(module), name))
        if held and all(isinstance(each, nn.Module) for each in held):
            return Tree(tuple(held))
        if held and all(isinstance(getattr(each, "__program__", None), Program) for each in held):
            return Own(held[0].__program__)
        return ANYTHING if held else Part(name)

    @staticmethod
    def of_instances(kind: type, objects: tuple[object, ...], name: str) -> Kind:
        """An attribute of one of these objects. What has no kind there is data: names of what is called stay."""
        if hasattr(object, name):
            return Part(name)
        method = getattr(kind, name, None)
        program = getattr(method, "__program__", None)
        if isinstance(program, Program):
            return Own(program)
        if not all(name in vars(each) for each in objects):
            return ANYTHING  # of some it is a constant of the class, or data that comes later
        held = [kind_of(vars(each)[name]) for each in objects]
        modules = tuple(module for each in held if isinstance(each, Tree) for module in each.modules)
        if held and all(isinstance(each, Tree) for each in held):
            return Tree(modules)
        inside = {each.kind for each in held if isinstance(each, Instances)}
        if len(inside) == 1 and all(isinstance(each, Instances) for each in held):
            objects = tuple(one for each in held if isinstance(each, Instances) for one in each.held)
            return Instances(inside.pop(), objects)
        return held[0] if len(held) == 1 else ANYTHING

    def item(self, owner: Kind) -> Kind:
        match owner:
            case Tree() | Computed():
                return owner
            case Given() if self.deferred:
                return owner
            case Part(name=name, root=root):
                return Part(f"{name.removesuffix('[…]')}[…]", root)
            case _:
                return ANYTHING

    # --- calls ---

    def call(self, op: ops.Call) -> Kind:
        if op.target == MODULE_CALL:
            return ANYTHING
        callee = self.kind(op.function)
        match callee:
            case KnownName(target=target):
                return self.known(op, target)
            case Space(name=name) | HostName(name=name):
                self.host(name, op.span)
            case Own(program=program):
                if program is not None:
                    self.found.reached.append(program)
            case Tree() | Given() | Instances():
                pass
            case Part():
                return self.method(op, callee)
            case Constant() | Computed() | Anything():
                self.found.dynamic.append(op.span)
        return ANYTHING

    def method(self, op: ops.Call, callee: Part) -> Kind:
        name = callee.name
        receiver = self.receiver(op.function)
        if isinstance(receiver, Tree) and name in TREE_METHODS:
            return receiver if name in ("children", "modules", "values", "items", "named_children") else ANYTHING
        if name in FORMATTING:
            text = self.owner(op.function)
            if not (isinstance(text, Literal) and looks_at_values(text.value)):
                self.host(f"the method `.{name}(…)` of a text that only the run can give", op.span)
        elif is_known_method(name):
            if name == "sort" and any(argument.keyword == "key" or argument.star for argument in op.arguments):
                self.found.dynamic.append(op.span)
            if name == "sub" and any(self.may_be_called(argument.value) for argument in op.arguments):
                self.found.dynamic.append(op.span)  # a pattern calls what it is given
        elif name in TEXT_METHODS | TREE_METHODS or (name in BARE_METHODS and not op.arguments) or trains(op, name):
            pass
        elif not self.deferred or callee.root == COMPUTED:
            self.host(f"the method `.{name}(…)`", op.span)
        return callee.root if self.deferred or callee.root == COMPUTED else ANYTHING

    def receiver(self, function: Operand) -> Kind:
        """What a method is taken from."""
        owner = self.owner(function)
        return ANYTHING if owner is None else self.kind(owner)

    def owner(self, function: Operand) -> Operand | None:
        return self.owners.get(function.name) if isinstance(function, Value) else None

    def may_be_called(self, argument: Operand) -> bool:
        """Whether an argument may be a function of which nothing is known."""
        return self.kind(argument) != COMPUTED

    def known(self, op: ops.Call, target: str) -> Kind:
        """A call of the closed set. A few look up attributes by a text, or call what they are given."""
        plain = [argument.value for argument in op.arguments if argument.keyword is None and not argument.star]
        match target:
            case "builtins.getattr" | "builtins.hasattr" | "builtins.setattr" | "builtins.delattr":
                name = plain[1].value if len(plain) > 1 and isinstance(plain[1], Literal) else None
                if not isinstance(name, str) or not name.isidentifier() or not allowed_attribute(name):
                    self.host(f"{target.partition('.')[2]} with a name that only the run can give", op.span)
                elif target in ("builtins.setattr", "builtins.delattr"):
                    self.assigns(plain[0], name, op.span)
                elif target == "builtins.getattr":
                    return self.attribute(self.kind(plain[0]), name)
            case "builtins.type":
                if len(op.arguments) != 1 or len(plain) != 1:
                    self.host("type, making a class", op.span)
                return Part("type(…)")  # a class of which nothing is known, and which may be called
            case "builtins.iter" if len(op.arguments) != 1 or len(plain) != 1:
                self.found.dynamic.append(op.span)
            case "collections.defaultdict" | "numpy.errstate" | "numpy.printoptions" | "numpy.set_printoptions":
                self.found.dynamic.append(op.span)
        self.handed(op, target)
        return self.result(target, [self.kind(each) for each in plain])

    def handed(self, op: ops.Call, target: str) -> None:
        """What a known call does with functions, streams and texts that it is given."""
        row = known_target(target) if target in ALL else None
        calls = () if row is None else row.calls
        for number, argument in enumerate(op.arguments):
            place = number if argument.keyword is None else argument.keyword
            if calls and (argument.star or place in calls):
                self.found.dynamic.append(op.span)
            if argument.keyword in ("file", "stream") or (argument.star == "**" and target in PRINTING):
                self.host(f"{target.partition('.')[2]} to a stream that only the run can give", op.span)
            if argument.keyword == "bar_format" and not (
                isinstance(argument.value, Literal) and looks_at_values(argument.value.value)
            ):
                self.host(f"{target.partition('.')[2]} with a `bar_format` that only the run can give", op.span)

    def result(self, target: str, kinds: list[Kind]) -> Kind:
        """What a call of the closed set gives for these arguments."""
        if target in THROUGH or (self.deferred and target == "builtins.list"):
            trees = [kind for kind in kinds if isinstance(kind, Tree)]
            if kinds and len(trees) == len(kinds):
                return Tree(tuple(module for tree in trees for module in tree.modules))
            roots = [kind.root if isinstance(kind, Part) else kind for kind in kinds]
            return GIVEN if self.deferred and GIVEN in roots else ANYTHING
        row = known_target(target) if target in ALL else None
        return COMPUTED if row is not None and (row.leaf or row.scalar) else ANYTHING


def _escaping(op: Op) -> Iterator[Operand]:
    """The operands of an op which it stores, hands on or hands over: all but those that it only looks into."""
    match op:
        case ops.Call(arguments=arguments) | ops.Forward(arguments=arguments) | ops.Invoke(arguments=arguments):
            yield from (argument.value for argument in arguments)
        case ops.SetAttribute(value=value) | ops.Write(value=value) | ops.Skip(value=value) | ops.Store(value=value):
            yield value
        case ops.SetItem(index=index, value=value):
            yield from (index, value)
        case ops.Item(index=index):
            yield index
        case ops.SetGrad(gradient=gradient):
            yield gradient
        case ops.For(initial=initial):
            yield from initial
        case ops.Operator(in_place=False, operator=operator) if operator not in ("+", "*", "|"):
            return
        case (
            ops.Attribute() | ops.Delete() | ops.Unpack() | ops.Bound() | ops.Load() | ops.Format() | ops.If()
            | ops.Read() | ops.Grad() | ops.Stop() | ops.Session() | ops.Steps() | ops.At() | ops.AtGradient()
        ):  # fmt: skip
            return
        case _:
            yield from operands(op)
