"""What the drafters that learn from text share: files, request scopes, trees made of paths.

The tables themselves stand with their methods, in ``specdec.drafters``.
"""

from specdec.tables.drafter import Table as Table
from specdec.tables.drafter import TableDrafter as TableDrafter
