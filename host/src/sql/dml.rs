//! INSERT, UPDATE and DELETE: planned as SELECTs, turned into change sets.
