"""Parts that the explorer and the live panel share: errors, JavaScript, style sheet, color maps and quantized maps."""
