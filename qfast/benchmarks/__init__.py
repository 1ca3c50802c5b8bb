"""`qfast bench`: how fast every model trains on this machine and on the user's data, compared with Qlib or torch."""
