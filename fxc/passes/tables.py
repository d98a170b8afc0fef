"""What the passes int8 and int4 share that pack the tables of embeddings, and the heads that are tied to them.

    constant @embed.weight: f32[512, 64]
    %0: i64[s0] = input "ids"
    %1: f32[s0, 64] = aten.embedding(@embed.weight, %0)  # embed
    %2: f32[s0, 512] = aten.linear(%1, @embed.weight)  # head
    return "out" %2
    ---
    constant @embed.qweight: i8[512, 64]
    constant @embed.scale: f32[512]
    %0: i64[s0] = input "ids"
    %1: f32[s0, 64] = fxc.int8_embedding(%0, @embed.qweight, @embed.scale, f32)  # embed (int8)
    %2: f32[s0, 512] = fxc.int8_linear(%1, @embed.qweight, @embed.scale, None)  # head (int8)
    return "out" %2
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import fx
from torch._ops import OpOverload

from fxc.ir.edit import call, read, sweep
from fxc.ir.names import layer_name
from fxc.ir.program import Program, users_of
from fxc.passes.base import Context, Refusal, Result
from fxc.passes.learned_linears import Parts
from fxc.passes.linears import BEYOND, FLOATS, PackLinears, nbytes_of
from fxc.schemes import int4, int8
from fxc.schemes.scheme import EMBEDDING, LINEAR, Scheme

# A table with less than this share of the rows of the largest one stays: little is to be gained, and positions are such.
SMALL = 0.25


@dataclass(frozen=True)
class PackTables(PackLinears):
    """Base of the passes that pack tables too."""

    embeddings: Literal["float", "int8", "int4"] = field(default="float", kw_only=True)
    """What the tables that tokens are looked up in are packed as, by row, with a head that is tied to one. Numbers are rounded
    to nearest, unless the layers learn theirs in the same format: then a tied head does as well, and the table has its."""

    def tied(self, scheme: Scheme) -> OpOverload:
        """The product of a head whose table is packed as `scheme`."""
        raise NotImplementedError

    def table_options(self, scheme: Scheme, columns: int) -> dict[str, Any]:
        """How tables with rows of so many numbers are packed. Groups of int4 are the largest that divide."""
        if scheme is int8.SCHEME:
            return {}
        group = max((group for group in int4.GROUPS if columns % group == 0), default=0)
        return {"group": group, "symmetric": True, "full_range": True}

    def pack_tables(self, program: Program, context: Context, result: Result) -> tuple[set[str], set[fx.Node]]:
        """The constants that it said something about, and the nodes that it made."""
        told: set[str] = set()
        made: set[fx.Node] = set()
        if self.embeddings == "float":
            return told, made
        scheme = self._table_scheme()
        tables = dict.fromkeys(
            node.args[0].target
            for node in program.graph.find_nodes(op="call_function", target=EMBEDDING)
            if node.args[0].op == "get_attr"
        )
        rows = {name: program.constants[name].shape[0] for name in tables}
        for name in tables:
            fqn, table = layer_name(name), program.constants[name]
            pattern = context.skips(fqn) if self.covers(fqn) else None
            reason = f"skipped by the pattern {pattern}" if pattern else self._declines_table(program, name, scheme)
            is_tied = any(user.target is LINEAR for user in users_of(program, name))
            if reason is None and not is_tied and rows[name] < SMALL * max(rows.values()):
                reason = f"a table of {rows[name]} rows beside one of {max(rows.values())}: nothing to gain"
            learns = is_tied and self._learns_heads()
            if reason is None and not learns and not context.rewrites.may(fqn):
                reason = BEYOND
            if reason:
                told.add(name)
                result.refusals.append(Refusal(fqn, reason, nbytes_of(table)))
            elif not learns:
                made |= self._pack_table(program, name, scheme, result)
        sweep(program)
        return told, made

    def may_read(self, user: fx.Node, fqn: str) -> bool:
        return super().may_read(user, fqn) or (self._learns_heads() and _reads_as_table(user, fqn))

    def follow(self, program: Program, packed: dict[str, Parts], result: Result) -> None:
        scheme = self._table_scheme()
        for name in packed if self._learns_heads() else ():
            lookups = [user for user in users_of(program, name) if user.target is EMBEDDING]
            options = self.table_options(scheme, program.constants[name].shape[1]) if lookups else {}
            self._rewrite_users(program, lookups, packed[name], scheme, options, result)

    def _table_scheme(self) -> Scheme | None:
        return {"float": None, "int8": int8.SCHEME, "int4": int4.SCHEME}[self.embeddings]

    def _learns_heads(self) -> bool:
        """Whether a head that is tied to a table is a layer like others to what learns, and the table has its numbers."""
        return self._table_scheme() is self.scheme and self.statistic() is not None

    def _declines_table(self, program: Program, name: str, scheme: Scheme) -> str | None:
        """Why the table `name` stays as it is, or None."""
        table = program.constants[name]
        if not self.covers(layer_name(name)):
            return f"outside of only={self.only}"
        if table.dtype not in FLOATS:
            return f"its table is {table.dtype}"
        if not all(_reads_as_table(user, name) for user in users_of(program, name)):
            return "it is tied to something else than a linear layer"
        options = self.table_options(scheme, table.shape[1])
        if options.get("group") == 0:
            return f"no size of groups divides its rows of {table.shape[1]}: use embeddings=int8"
        if sum(map(nbytes_of, scheme.planned(table, **options).values())) >= nbytes_of(table):
            return f"{scheme.label} with its scales would not be smaller than {table.dtype}{list(table.shape)}"
        return None

    def _pack_table(self, program: Program, name: str, scheme: Scheme, result: Result) -> set[fx.Node]:
        table = program.constants[name]
        options = self.table_options(scheme, table.shape[1])
        users = list(users_of(program, name))
        names = self.add_parts(program, name, layer_name(name), users[0], lambda weight: scheme.pack(weight, **options))
        result.covered_bytes += nbytes_of(table)
        return self._rewrite_users(program, users, names, scheme, options, result)

    def _rewrite_users(
        self, program: Program, users: list[fx.Node], names: Parts, scheme: Scheme, options: dict[str, Any], result: Result
    ) -> set[fx.Node]:
        """Let lookups and heads read packed parts: the nodes that do it. names: of the constants, by part."""
        lookup = next(product.operator for product in scheme.products if product.layer is EMBEDDING)
        made: set[fx.Node] = set()
        for user in users:
            parts = {part: read(program, fqn, before=user) for part, fqn in names.items()}
            if user.target is EMBEDDING:
                operator, given = lookup, {"indices": user.args[1], "dtype": user.meta["val"].dtype}
            else:
                operator, given = self.tied(scheme), {"x": user.args[0], "bias": user.args[2] if len(user.args) > 2 else None}
            given |= options | parts
            args = tuple(given.get(argument.name) for argument in operator._schema.arguments)
            made.add(call(program, operator, args, replacing=user, by=self.name))
            result.changed += 1
        return made


def _reads_as_table(user: fx.Node, name: str) -> bool:
    """Whether `user` looks the constant `name` up, or multiplies by it, and does nothing else with it."""
    reads = [i for i, a in enumerate(user.args) if isinstance(a, fx.Node) and a.op == "get_attr" and a.target == name]
    return (user.target is EMBEDDING and reads == [0]) or (user.target is LINEAR and reads == [1])
