//! Policy files that other users can change.
