#!/usr/bin/env python3
"""Writes the files common_*.slt: SQL that Tidegate and SQLite have in common, with SQLite's answers.

The answers never come from Tidegate. Run it after a change of the statements below:  python3 tests/slt/generate.py
Everything else under tests/slt is written by hand.
"""

import itertools
import os
import sqlite3

HERE = os.path.dirname(os.path.abspath(__file__))
HEAD = "# Written by generate.py; the answers are SQLite's.\n\n"


class File:
    def __init__(self, name, setup):
        self.name, self.out, self.count = name, [HEAD], 0
        self.db = sqlite3.connect(":memory:")
        self.db.execute("PRAGMA case_sensitive_like = ON")
        for statement in setup:
            self.ok(statement)

    def ok(self, sql):
        """A statement that both take, in their own types."""
        self.out.append(f"statement ok\n{sql}\n\n")
        self.db.execute(sql.replace("DOUBLE", "REAL"))
        self.count += 1

    def count_of(self, sql):
        """A statement, and how many rows it is about."""
        done = self.db.execute(sql)
        self.out.append(f"statement count {done.rowcount}\n{sql}\n\n")
        self.count += 1

    def query(self, types, sql, sort=True):
        rows = [[show(cell, kind) for cell, kind in zip(row, types, strict=True)] for row in self.db.execute(sql)]
        if sort:
            rows.sort()
        lines = "".join(" ".join(row).rstrip() + "\n" for row in rows)
        self.out.append(f"query {types}{' rowsort' if sort else ''}\n{sql}\n----\n{lines}\n")
        self.count += 1

    def close(self):
        with open(os.path.join(HERE, f"common_{self.name}.slt"), "w", encoding="utf-8") as file:
            file.write("".join(self.out))
        return self.count


def show(cell, kind):
    if cell is None:
        return "NULL"
    if kind == "B":
        return "true" if cell else "false"
    if kind == "R":
        return repr(float(cell))
    if cell == "":
        return "(empty)"
    return str(cell)


def operators():
    f = File("operators", [])
    numbers = ["-3", "0", "2", "7", "NULL"]
    for op in ["=", "<>", "<", "<=", ">", ">="]:
        for a, b in itertools.product(numbers, numbers):
            if a == b == "NULL":
                continue
            f.query("B", f"SELECT {a} {op} {b}")
    for op in ["+", "-", "*"]:
        for a, b in itertools.product(["-3", "0", "7", "NULL", "2000000000"], ["-2", "0", "5", "NULL"]):
            if a == b == "NULL":
                continue
            f.query("I", f"SELECT {a} {op} ({b})")
    for op in ["/", "%"]:
        for a, b in itertools.product(["-7", "0", "7", "8"], ["-2", "3", "NULL"]):
            f.query("I", f"SELECT {a} {op} ({b})")
    for op in ["+", "-", "*", "/"]:
        for a, b in itertools.product(["-1.5", "0.25", "7.0"], ["-2.0", "0.5"]):
            f.query("R", f"SELECT {a} {op} ({b})")
    for op in ["AND", "OR"]:
        for a, b in itertools.product(["true", "false", "NULL"], repeat=2):
            f.query("B", f"SELECT ({a} {op} {b}) IS NULL")
            if not a == b == "NULL":
                f.query("B", f"SELECT {a} {op} {b}")
    for a in ["true", "false"]:
        f.query("B", f"SELECT NOT {a}")
        for test in ["IS TRUE", "IS NOT TRUE", "IS FALSE", "IS NOT FALSE", "IS NULL", "IS NOT NULL"]:
            f.query("B", f"SELECT {a} {test}")
            f.query("B", f"SELECT (CASE WHEN 1 = 0 THEN {a} END) {test}")
    texts = ["'a'", "'A'", "'ab'", "''", "'b'"]
    for op in ["=", "<>", "<", ">="]:
        for a, b in itertools.product(texts, texts):
            f.query("B", f"SELECT {a} {op} {b}")
    for text, pattern in itertools.product(["'apple'", "'Apple'", "''", "'a%e'"], ["'a%'", "'%l%'", "'_____'", "'%'", "'apple'", "''"]):
        f.query("B", f"SELECT {text} LIKE {pattern}")
        f.query("B", f"SELECT {text} NOT LIKE {pattern}")
    for value, members in itertools.product(["1", "4"], ["(1, 2, 3)", "(2, 3)", "(2, NULL)", "(1, NULL)"]):
        f.query("B", f"SELECT ({value} IN {members}) IS NULL")
        f.query("B", f"SELECT {value} IN {members}")
        f.query("B", f"SELECT {value} NOT IN {members}")
    for value, (low, high) in itertools.product(["1", "5", "9"], [("1", "5"), ("5", "1"), ("NULL", "5"), ("2", "NULL")]):
        f.query("B", f"SELECT {value} BETWEEN {low} AND {high}")
        f.query("B", f"SELECT {value} NOT BETWEEN {low} AND {high}")
    for a, b in itertools.product(["1", "2", "NULL"], repeat=2):
        if not a == b == "NULL":
            f.query("B", f"SELECT {a} IS NOT DISTINCT FROM {b}")
            f.query("B", f"SELECT {a} IS DISTINCT FROM {b}")
    for a, b in itertools.product(["'x'", "''", "'ü'"], repeat=2):
        f.query("T", f"SELECT {a} || {b}")
    for precedence in [
        "1 + 2 * 3", "(1 + 2) * 3", "-2 + 5", "- (2 + 5)", "10 - 4 - 3", "100 / 10 / 2", "7 % 4 * 2", "2 * 7 % 4", "- - 3",
    ]:
        f.query("I", f"SELECT {precedence}")
    for precedence in [
        "1 = 1 AND 2 = 3", "NOT 1 = 2", "NOT 1 = 2 AND 1 = 2", "1 = 2 OR 1 = 1 AND 1 = 2", "(1 = 1 OR 1 = 1) AND 1 = 2",
        "1 < 2 = true", "1 + 1 = 2 AND 3 - 1 < 3", "NOT (1 = 2 OR 2 = 1)",
    ]:
        f.query("B", f"SELECT {precedence}")
    return f.close()


def functions():
    f = File("functions", [])
    for text in ["'Hello'", "''", "'ABC def'", "'x'"]:
        for function in ["upper", "lower", "trim", "ltrim", "rtrim"]:
            f.query("T", f"SELECT {function}({text})")
        f.query("I", f"SELECT length({text})")
    for text in ["'  a b  '", "'\u00fcber'"]:
        for function in ["trim", "ltrim", "rtrim"]:
            f.query("T", f"SELECT '[' || {function}({text}) || ']'")
        f.query("I", f"SELECT length({text})")
    for start, count in itertools.product([1, 2, 5, 9], [0, 1, 3, 100]):
        f.query("T", f"SELECT '[' || substr('abcdef', {start}, {count}) || ']'")
    for start in [1, 3, 6, 7]:
        f.query("T", f"SELECT '[' || substr('abcdef', {start}) || ']'")
    for a, b, c in [("'banana'", "'an'", "'*'"), ("'banana'", "'x'", "'y'"), ("'aaa'", "'a'", "''"), ("''", "'a'", "'b'")]:
        f.query("T", f"SELECT '[' || replace({a}, {b}, {c}) || ']'")
    for value in ["-5", "0", "5", "-2147483648"]:
        f.query("I", f"SELECT abs({value})")
    for arguments in ["1, 2", "NULL, 2", "NULL, NULL, 3", "4, NULL"]:
        f.query("I", f"SELECT coalesce({arguments})")
    for a, b in itertools.product(["1", "2"], ["1", "2", "NULL"]):
        f.query("I", f"SELECT nullif({a}, {b})")
    for value, places in itertools.product(["1.25", "-1.75", "2.5", "1234.5678"], [0, 1, 3]):
        # Halves may be rounded either way in binary: none is asked for.
        if (value, places) not in [("1.25", 1), ("-1.75", 1), ("2.5", 0)]:
            f.query("R", f"SELECT round({value}, {places})")
    for value in ["4.0", "2.25", "0.0"]:
        f.query("R", f"SELECT sqrt({value})")
    for value in ["1.5", "-1.5", "2.0", "-0.5"]:
        f.query("I", f"SELECT CAST(floor({value}) AS INT)")
        f.query("I", f"SELECT CAST(ceil({value}) AS INT)")
    for condition in ["1 = 1", "1 = 2", "NULL"]:
        f.query("T", f"SELECT CASE WHEN {condition} THEN 'yes' ELSE 'no' END")
        f.query("T", f"SELECT CASE WHEN {condition} THEN 'yes' END")
    for value in ["1", "2", "3", "NULL"]:
        f.query("T", f"SELECT CASE {value} WHEN 1 THEN 'one' WHEN 2 THEN 'two' ELSE 'many' END")
        f.query("T", f"SELECT CASE {value} WHEN 1 THEN 'one' WHEN NULL THEN 'none' END")
    for value in ["'12'", "'-7'", "'0'"]:
        f.query("I", f"SELECT CAST({value} AS INT)")
        f.query("I", f"SELECT CAST({value} AS BIGINT) + 1")
    for value in ["12", "-7", "0"]:
        f.query("T", f"SELECT CAST({value} AS TEXT) || '!'")
    for value in ["1.75", "-1.75", "3.0"]:
        f.query("I", f"SELECT CAST({value} AS INT)")
    return f.close()


PEOPLE = [
    (1, "'ann'", 30, "'red'", 1.5), (2, "'bob'", "NULL", "'blue'", 2.5), (3, "'cid'", 25, "NULL", "NULL"),
    (4, "'dan'", 41, "'red'", -1.0), (5, "'eve'", 25, "'green'", 0.0), (6, "''", 19, "'blue'", 10.25),
    (7, "'gus'", 30, "'red'", "NULL"), (8, "'Ann'", "NULL", "NULL", 3.0), (9, "'ian'", -4, "'green'", 7.75),
    (10, "'joe'", 0, "'red'", 1.5),
]
PETS = [
    (1, 1, "'cat'", 3), (2, 1, "'dog'", 5), (3, 4, "'cat'", "NULL"), (4, "NULL", "'fish'", 1), (5, 9, "'dog'", 2),
    (6, 9, "'cat'", 9), (7, 77, "'bird'", 4), (8, 2, "NULL", 7),
]
TABLES = [
    "CREATE TABLE people (id INT PRIMARY KEY, name TEXT, age INT, color TEXT, score DOUBLE)",
    "INSERT INTO people VALUES " + ", ".join("(%s)" % ", ".join(map(str, row)) for row in PEOPLE),
    "CREATE TABLE pets (id INT PRIMARY KEY, owner INT, kind TEXT, age INT)",
    "INSERT INTO pets VALUES " + ", ".join("(%s)" % ", ".join(map(str, row)) for row in PETS),
]
PREDICATES = [
    "age = 30", "age <> 30", "age < 25", "age >= 25", "age IS NULL", "age IS NOT NULL", "name = 'ann'", "name LIKE 'a%'",
    "name LIKE '%n'", "name = ''", "color = 'red'", "color IS NULL", "color IN ('red', 'blue')",
    "color NOT IN ('red', 'blue')", "age IN (25, 30)", "age NOT IN (25, NULL)", "age BETWEEN 20 AND 30",
    "age NOT BETWEEN 20 AND 30", "score > 1", "score IS NULL", "score = 1.5", "id % 2 = 0", "id * 2 > age",
    "age + id > 30", "length(name) = 3", "upper(name) = 'ANN'", "coalesce(age, 0) = 0", "coalesce(color, 'none') = 'none'",
    "id = 5", "id > 3 AND id <= 7", "id IN (1, 5, 99)", "id < 0", "id >= 10", "true", "false", "age = age", "name < 'c'",
    "name >= 'd'", "-age > 0", "CASE WHEN age > 26 THEN color ELSE name END = 'red'",
]


def where():
    f = File("where", TABLES)
    for predicate in PREDICATES:
        f.query("I", f"SELECT id FROM people WHERE {predicate}")
        f.query("I", f"SELECT id FROM people WHERE NOT ({predicate})")
        f.query("I", f"SELECT id FROM people WHERE ({predicate}) IS NULL")
        f.query("I", f"SELECT count(*) FROM people WHERE {predicate}")
    for (a, b), op in itertools.product(zip(PREDICATES, PREDICATES[7:]), ["AND", "OR"]):
        f.query("I", f"SELECT id FROM people WHERE {a} {op} {b}")
    for a, b in zip(PREDICATES, PREDICATES[13:]):
        f.query("I", f"SELECT id FROM people WHERE NOT ({a} AND NOT ({b}))")
    for columns, types in [("*", "ITITR"), ("name, id", "TI"), ("id + 1, age * 2", "II"), ("age, age", "II")]:
        if columns != "age, age":
            f.query(types, f"SELECT {columns} FROM people")
    return f.close()


def aggregates():
    f = File("aggregates", TABLES)
    simple = [
        ("I", "count(*)"), ("I", "count(age)"), ("I", "count(DISTINCT age)"), ("I", "sum(age)"), ("I", "min(age)"),
        ("I", "max(age)"), ("R", "avg(age)"), ("T", "min(name)"), ("T", "max(color)"), ("R", "sum(score)"),
        ("I", "sum(age) + count(*)"), ("I", "sum(CASE WHEN color = 'red' THEN 1 ELSE 0 END)"), ("I", "max(id) - min(id)"),
        ("I", "sum(DISTINCT age)"),
    ]
    for (kind, function), rest in itertools.product(simple, ["", " WHERE age > 20", " WHERE false", " WHERE color = 'red'"]):
        f.query(kind, f"SELECT {function} FROM people{rest}")
    for kind, function in simple:
        f.query("T" + kind, f"SELECT color, {function} FROM people GROUP BY color")
        f.query("I" + kind, f"SELECT id % 3, {function} FROM people WHERE id > 2 GROUP BY id % 3")
    for having in ["count(*) > 1", "count(*) = 1", "sum(age) > 50", "min(age) IS NULL", "color IS NOT NULL AND max(score) > 2"]:
        f.query("TI", f"SELECT color, count(*) FROM people GROUP BY color HAVING {having}")
    for keys, types in [("color", "T"), ("age", "I"), ("color, age", "TI"), ("length(name)", "I")]:
        f.query(types, f"SELECT DISTINCT {keys} FROM people")
        f.query(types + "I", f"SELECT {keys}, count(*) FROM people GROUP BY {keys}")
        f.query("I", f"SELECT count(*) FROM (SELECT {keys} FROM people GROUP BY {keys}) g")
    f.query("II", "SELECT count(*), sum(n) FROM (SELECT count(*) AS n FROM people GROUP BY color) g")
    f.query("TI", "SELECT color, max(age) FROM people GROUP BY color ORDER BY max(age) DESC NULLS LAST, color NULLS LAST", sort=False)
    for filter_clause in ["age > 25", "color = 'red'", "score IS NULL"]:
        f.query("II", f"SELECT count(*) FILTER (WHERE {filter_clause}), sum(id) FILTER (WHERE {filter_clause}) FROM people")
    return f.close()


def ordering():
    f = File("ordering", TABLES)
    keys = ["id", "age NULLS FIRST, id", "age DESC NULLS LAST, id", "color NULLS LAST, id DESC", "name, id", "name DESC, id",
            "score DESC NULLS FIRST, id", "length(name), id", "id % 3, id", "age % 7 NULLS LAST, name, id", "-id"]
    limits = ["", " LIMIT 3", " LIMIT 0", " LIMIT 100", " LIMIT 4 OFFSET 2", " LIMIT 5 OFFSET 8", " LIMIT 2 OFFSET 50"]
    for key, limit in itertools.product(keys, limits):
        f.query("I", f"SELECT id FROM people ORDER BY {key}{limit}", sort=False)
    for key in keys:
        f.query("I", f"SELECT id FROM (SELECT id FROM people ORDER BY {key} LIMIT 4) t")
    f.query("IT", "SELECT age AS a, name FROM people ORDER BY a NULLS FIRST, 2", sort=False)
    f.query("TI", "SELECT name, age FROM people WHERE color = 'red' ORDER BY 2 DESC, 1", sort=False)
    return f.close()


def joins():
    f = File("joins", TABLES)
    conditions = ["p.id = q.owner", "p.id = q.owner AND q.kind = 'cat'", "p.id = q.owner AND p.age > 20", "p.age = q.age", "p.id < q.id AND p.id > 7"]
    for kind, on in itertools.product(["JOIN", "LEFT JOIN", "RIGHT JOIN", "FULL JOIN"], conditions):
        f.query("II", f"SELECT p.id, q.id FROM people p {kind} pets q ON {on}")
        f.query("I", f"SELECT count(*) FROM people p {kind} pets q ON {on}")
        f.query("TT", f"SELECT p.name, q.kind FROM people p {kind} pets q ON {on} WHERE p.id IS NOT NULL")
        f.query("II", f"SELECT p.id, q.id FROM people p {kind} pets q ON {on} WHERE q.id IS NULL OR q.age > 2")
    f.query("I", "SELECT count(*) FROM people CROSS JOIN pets")
    f.query("I", "SELECT count(*) FROM people, pets WHERE people.id = pets.owner")
    f.query("II", "SELECT a.id, b.id FROM people a JOIN people b ON a.age = b.age AND a.id < b.id")
    f.query("III", "SELECT a.id, b.id, c.id FROM people a JOIN people b ON a.color = b.color JOIN pets c ON c.owner = b.id WHERE a.id < b.id")
    f.query("IT", "SELECT p.id, q.kind FROM people p JOIN (SELECT owner, kind FROM pets WHERE age > 2) q ON q.owner = p.id")
    f.query("TI", "SELECT p.name, count(q.id) FROM people p LEFT JOIN pets q ON q.owner = p.id GROUP BY p.id, p.name")
    f.query("TI", "SELECT q.kind, sum(p.age) FROM people p JOIN pets q ON q.owner = p.id GROUP BY q.kind")
    return f.close()


def subqueries():
    f = File("subqueries", TABLES)
    for predicate in ["kind = 'cat'", "age > 3", "false", "true", "kind IS NULL"]:
        f.query("I", f"SELECT id FROM people WHERE id IN (SELECT owner FROM pets WHERE {predicate})")
        f.query("I", f"SELECT id FROM people WHERE id NOT IN (SELECT owner FROM pets WHERE owner IS NOT NULL AND ({predicate}))")
        f.query("I", f"SELECT id FROM people WHERE id NOT IN (SELECT owner FROM pets WHERE {predicate})")
        f.query("I", f"SELECT id FROM people p WHERE EXISTS (SELECT 1 FROM pets q WHERE q.owner = p.id AND ({predicate.replace('age', 'q.age')}))")
        f.query("I", f"SELECT id FROM people p WHERE NOT EXISTS (SELECT 1 FROM pets q WHERE q.owner = p.id AND ({predicate.replace('age', 'q.age')}))")
        # Inside another expression, where NULL is told from false.
        for member in ["id IN (SELECT owner", "id NOT IN (SELECT owner", "age IN (SELECT age", "age NOT IN (SELECT age"]:
            member = f"{member} FROM pets WHERE {predicate})"
            f.query("I", f"SELECT id FROM people WHERE age = 30 OR {member}")
            f.query("I", f"SELECT id FROM people WHERE NOT (id > 2 AND {member})")
            f.query("I", f"SELECT id FROM people WHERE ({member}) IS NULL")
        f.query("I", f"SELECT id FROM people WHERE age > (SELECT min(age) FROM pets WHERE {predicate})")
        f.query("II", f"SELECT id, (SELECT count(*) FROM pets WHERE {predicate}) FROM people WHERE id < 4")
        f.query("II", f"SELECT id, (SELECT max(q.age) FROM pets q WHERE q.owner = people.id) FROM people WHERE id < 5")
    for predicate in ["age > 20", "color = 'red'", "id < 5"]:
        f.query("IT", f"WITH t AS (SELECT id, name FROM people WHERE {predicate}) SELECT * FROM t")
        f.query("I", f"WITH t AS (SELECT * FROM people WHERE {predicate}), u AS (SELECT id FROM t WHERE id > 2) SELECT count(*) FROM u")
        f.query("II", f"WITH t AS (SELECT * FROM people WHERE {predicate}) SELECT a.id, b.id FROM t a JOIN t b ON a.id = b.id - 1")
        f.query("I", f"SELECT max(n) FROM (SELECT count(*) AS n FROM people WHERE {predicate} GROUP BY color) t")
    f.query("I", "WITH RECURSIVE n AS (SELECT 1 AS i UNION ALL SELECT i + 1 FROM n WHERE i < 10) SELECT i FROM n")
    f.query("I", "WITH RECURSIVE n AS (SELECT 1 AS i UNION ALL SELECT i * 2 FROM n WHERE i < 100) SELECT sum(i) FROM n")
    for op in ["UNION", "UNION ALL", "INTERSECT", "EXCEPT"]:
        for a, b in [("age FROM people", "age FROM pets"), ("id FROM people", "owner FROM pets"), ("id FROM people WHERE id < 5", "id FROM people WHERE id > 3")]:
            f.query("I", f"SELECT {a} {op} SELECT {b}")
            f.query("I", f"SELECT count(*) FROM (SELECT {a} {op} SELECT {b}) t")
        f.query("T", f"SELECT color FROM people {op} SELECT kind FROM pets")
        f.query("I", f"SELECT id FROM people {op} SELECT id FROM pets ORDER BY 1 DESC LIMIT 4", sort=False)
    return f.close()


def windows():
    f = File("windows", TABLES)
    functions = ["row_number()", "rank()", "dense_rank()", "count(*)", "sum(id)", "min(age)", "max(age)", "lag(id)", "lead(id)",
                 "lag(id, 2)", "lead(id, 2, -1)", "first_value(id)", "ntile(3)"]
    overs = ["ORDER BY id", "PARTITION BY color ORDER BY id", "ORDER BY age DESC NULLS LAST, id", "PARTITION BY id % 2 ORDER BY name, id"]
    for function, over in itertools.product(functions, overs):
        f.query("II", f"SELECT id, {function} OVER ({over}) FROM people")
    for function in ["count(*)", "sum(id)", "max(age)"]:
        f.query("II", f"SELECT id, {function} OVER () FROM people")
        f.query("II", f"SELECT id, {function} OVER (PARTITION BY color) FROM people")
        for frame in ["ROWS BETWEEN 1 PRECEDING AND 1 FOLLOWING", "ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW", "ROWS BETWEEN 2 PRECEDING AND CURRENT ROW", "ROWS BETWEEN CURRENT ROW AND UNBOUNDED FOLLOWING"]:
            f.query("II", f"SELECT id, {function} OVER (ORDER BY id {frame}) FROM people")
    f.query("I", "SELECT id FROM (SELECT id, row_number() OVER (PARTITION BY color ORDER BY id) AS n FROM people) t WHERE n = 1")
    f.query("II", "SELECT id, sum(count(*)) OVER (ORDER BY id) FROM people GROUP BY id")
    return f.close()


def changes():
    """The same changes on both sides; after each the whole table is compared."""
    f = File("changes", TABLES)
    whole = lambda: f.query("ITITR", "SELECT * FROM people")
    for sql in [
        "UPDATE people SET age = age + 1 WHERE color = 'red'",
        "UPDATE people SET age = NULL WHERE id = 1",
        "UPDATE people SET name = upper(name), score = score * 2 WHERE score > 1",
        "UPDATE people SET color = CASE WHEN age IS NULL THEN 'none' ELSE color END",
        "UPDATE people SET age = id WHERE false",
        "UPDATE people SET age = (SELECT max(age) FROM pets) WHERE id IN (SELECT owner FROM pets)",
        "UPDATE people SET id = id + 100 WHERE id > 8",
        "UPDATE people SET color = name, name = color WHERE id = 5",
        "UPDATE people SET score = 0.5",
        "DELETE FROM people WHERE id = 3",
        "DELETE FROM people WHERE id = 3",
        "DELETE FROM people WHERE age IS NULL AND id > 100",
        "DELETE FROM people WHERE color = 'red' AND age > 40",
        "DELETE FROM people WHERE id IN (SELECT owner FROM pets WHERE kind = 'dog')",
        "DELETE FROM people WHERE 1 = 0",
        "DELETE FROM people WHERE id NOT IN (SELECT id FROM people WHERE id < 8)",
        "INSERT INTO people VALUES (20, 'tia', 1, 'red', 1.0), (21, 'uma', NULL, NULL, NULL)",
        "INSERT INTO people (id, name) VALUES (22, 'vic')",
        "INSERT INTO people (name, id) VALUES ('wes', 23)",
        "INSERT INTO people (id, name, age) SELECT id + 1000, kind, age FROM pets WHERE age > 3",
        "INSERT INTO people (id) SELECT id FROM people WHERE false",
        "INSERT INTO people (id, age) SELECT max(id) + 1, count(*) FROM people",
        "UPDATE people SET age = coalesce(age, 0) WHERE name IS NOT NULL",
        "DELETE FROM people WHERE EXISTS (SELECT 1 FROM pets WHERE pets.kind = people.name)",
        "DELETE FROM people",
    ]:
        f.count_of(sql)
        whole()
    return f.close()


if __name__ == "__main__":
    total = 0
    for part in [operators, functions, where, aggregates, ordering, joins, subqueries, windows, changes]:
        records = part()
        print(f"{records:5} records  common_{part.__name__}.slt")
        total += records
    print(f"{total:5} records")
