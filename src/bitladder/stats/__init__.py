"""Pure statistics: values in, values out; a random Generator is passed in."""
