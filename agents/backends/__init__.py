"""How an update is carried out: backends that are equal in result and differ in speed."""
