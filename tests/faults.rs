//! Strangers, bad input and limits, at connect and on an established connection.
