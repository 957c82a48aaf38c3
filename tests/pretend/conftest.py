"""The device is there before the first backward pass, for then autograd's engine counts the devices that it makes threads for."""

import pretend

pretend.register()
