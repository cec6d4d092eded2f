// Click a column head, or press Enter or space on it, to sort its table; again to turn the order around.
function sort(head) {
  const column = [...head.parentNode.children].indexOf(head);
  const body = head.closest("table").tBodies[0];
  const numeric = head.classList.contains("number");
  const order = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
  const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
  const rows = [...body.rows].sort((a, b) =>
    numeric ? Number(key(a)) - Number(key(b)) : key(a).localeCompare(key(b), undefined, { numeric: true }),
  );
  if (order === "descending") rows.reverse();
  for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", order);
  body.append(...rows);
}

for (const button of document.querySelectorAll("th [role=button]")) {
  button.addEventListener("click", () => sort(button.closest("th")));
  button.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    sort(button.closest("th"));
  });
}
