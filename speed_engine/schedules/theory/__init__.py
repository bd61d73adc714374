"""What the SpeeD paper says about process increments, as functions of a schedule, checked against
the true numbers.
"""
