const order = ["auto", "light", "dark"];
const button = document.querySelector(".theme");
function use(theme) {
  button.textContent = { auto: "◐ auto", light: "☀ light", dark: "☾ dark" }[theme];
  button.dataset.theme = theme;
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}
function remembered() {
  try { return localStorage.getItem("remoe-theme"); } catch { return null; } // a page from disk may have no storage
}
function remember(theme) {
  try { localStorage.setItem("remoe-theme", theme); } catch { /* the choice then lasts as long as the page */ }
}
use(order.includes(remembered()) ? remembered() : "auto");
button.addEventListener("click", () => {
  const theme = order[(order.indexOf(button.dataset.theme) + 1) % order.length];
  use(theme);
  remember(theme);
});
