// Before the first paint, so that no page flashes white: the theme that was chosen, if one was.
try {
  const { theme } = JSON.parse(localStorage.getItem("gemcut.settings")) ?? {};
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // nothing is kept
}
